"""lm-eval on a tiny model against each request alone, and on models that know or do not know the answers."""

import json
import math
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is in requirements-test.txt for Python 3.11 only")

import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from seqmodels import cli
from seqmodels.configs import densemamba, transformer
from seqmodels.errors import UserError
from seqmodels.evals import classification, harness, likelihood
from seqmodels.evals.harness_model import HarnessModel, sampling_of, stops_of
from seqmodels.evals.lists import LISTS, WITHOUT_FILE, parse
from seqmodels.evals.tasks import build as tasks
from seqmodels.generation import Sampling
from seqmodels.scripts import eval as eval_script
from tests.likelihood_models import BYTES, alone, model_and_params, step
from tests.run_fixtures import config_for, make_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recurrent():
    return model_and_params(densemamba)


@pytest.fixture(scope="module")
def attention():
    return model_and_params(transformer)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """As `harness.prepare` has it where there is no network, for libraries that are imported already."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)


def instances(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def harness_model(model_and_params, **options):
    return HarnessModel(*model_and_params, BYTES, **dict(piece=16, batch_size=2) | options)


def greedy(model, params, text, tokens):
    """The text's greedy continuation, a token at a time; it ends before the separator."""
    state, out = model.init_state(1, 64), []
    for token in [256, *text.encode()]:
        logits, state = step(model, params, jnp.int32(token), state)
    while len(out) < tokens and (token := int(jnp.argmax(logits[:257]))) != 256:
        out.append(token)
        logits, state = step(model, params, jnp.int32(token), state)
    return bytes(out).decode(errors="ignore")


def test_loglikelihoods_are_those_of_each_request_alone(recurrent):
    pairs = [("the cat", " sat"), ("", "x"), ("a longer text that goes on over a piece", " end"), ("the cat ", "sat")]
    found = harness_model(recurrent).loglikelihood(instances("loglikelihood", *pairs))
    for (value, is_greedy), request in zip(found, likelihood.continuations(BYTES, pairs), strict=True):
        nats, expected = alone(*recurrent, request)
        np.testing.assert_allclose(value, -nats, rtol=2e-5)
        assert is_greedy is expected


def test_a_greedy_continuation_is_known_as_one(recurrent):
    text = greedy(*recurrent, "one", 3)
    ((value, is_greedy),) = harness_model(recurrent).loglikelihood(instances("loglikelihood", ("one", text)))
    assert is_greedy and value < 0


def test_rolling_loglikelihoods(recurrent, attention):
    text = "all of this text is predicted, once"
    found = harness_model(recurrent).loglikelihood_rolling(instances("loglikelihood_rolling", (text,), ("",), ("b",)))
    whole = likelihood.Request(np.array([256, *text.encode()], np.int32), len(text))
    np.testing.assert_allclose(found[0], -alone(*recurrent, whole)[0], rtol=2e-5)
    assert found[1] == 0 and found[2] < 0
    model = harness_model(attention, context=10)
    (value,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))
    tokens = [256, *text.encode()]
    parts = [(0, 10, 10), (10, 20, 10), (20, 30, 10), (25, 35, 5)]  # inputs from, to; scored
    requests = [likelihood.Request(np.array(tokens[a : b + 1], np.int32), n) for a, b, n in parts]
    np.testing.assert_allclose(value, -sum(alone(*attention, request)[0] for request in requests), rtol=2e-5)


@pytest.mark.slow
def test_generated_texts_are_those_of_each_prompt_alone(recurrent, monkeypatch):
    monkeypatch.setattr("seqmodels.generation.BLOCK", 4)
    prompts = ["line 7", "a", "the quick brown fox jumps"]
    texts = [greedy(*recurrent, prompt, 11) for prompt in prompts]
    stop = texts[1][4:6] or "none"
    asked = [(prompts[0], {"max_gen_toks": 11}), (prompts[1], {"max_gen_toks": 11, "until": ["zzz", stop]})]
    asked += [(prompts[2], {"max_gen_toks": 6, "until": "", "do_sample": False, "temperature": 0.7})]
    found = harness_model(recurrent).generate_until(instances("generate_until", *asked))
    assert found == [texts[0], texts[1].split(stop)[0], greedy(*recurrent, prompts[2], 6)]
    assert len(found[1]) < len(texts[1])


def test_generation_ends_when_all_texts_have(recurrent, monkeypatch):
    """A block at a time is drawn, and none after the last text has its stop."""
    monkeypatch.setattr("seqmodels.generation.BLOCK", 2)
    drawn = []
    monkeypatch.setattr(BYTES, "decode", lambda row: drawn.append(len(row)) or "x" * len(row), raising=False)
    asked = [("a", {"max_gen_toks": 40, "until": ["xxx"]}), ("b", {"max_gen_toks": 40, "until": ["x"]})]
    found = harness_model(recurrent).generate_until(instances("generate_until", *asked))
    assert found == ["", ""] and max(drawn) <= 4


def test_a_transformers_prompt_is_cut_at_its_beginning(attention):
    model = harness_model(attention, context=16)
    text = "0123456789abcdefgh"
    assert model._prompt(text, 6) == [*text[-10:].encode()]
    with pytest.raises(UserError, match="max_gen_toks=16: must be less than the Transformer's context of 16"):
        model._prompt(text, 16)
    found = harness.evaluate(model, parse("cloze_generated"), limit=1)
    assert found["cloze_generated"]["not_served"].startswith("max_gen_toks=16: must be less than")


def test_options_of_generation():
    assert sampling_of({}) == sampling_of({"temperature": 0.0}) == Sampling(0.0)
    assert sampling_of({"temperature": 0.7, "do_sample": False}) == Sampling(0.0)
    assert sampling_of({"temperature": 0.7, "top_p": 0.9}) == Sampling(0.7, 0, 0.9)
    assert sampling_of({"do_sample": True, "top_k": 5}) == Sampling(1.0, 5, 1.0)
    assert stops_of({"until": "a"}) == ["a"] and stops_of({"until": ["a", ""]}) == ["a"] and stops_of({}) == []


class Knowing(LM):
    """Answers as the task files have it, or with `wrong` the opposite."""

    def __init__(self, wrong=False):
        super().__init__()
        lines = (json.loads(line) for line in (tasks.FOLDER / "endings.jsonl").read_text().splitlines())
        self.endings = {(e["prompt"], e["choices"][e["answer"]]) for e in lines}
        lines = (json.loads(line) for line in (tasks.FOLDER / "cloze.jsonl").read_text().splitlines())
        self.words = {example["prompt"]: example["word"] for example in lines}
        self.wrong = wrong

    def loglikelihood(self, requests):
        known = [args in self.endings or " " + self.words.get(args[0], "") == args[1] for args in map(_args, requests)]
        return [(-1.0, True) if right != self.wrong else (-3.0, False) for right in known]

    def loglikelihood_rolling(self, requests):
        return [-math.log(2) * len(request.args[0].encode()) for request in requests]  # a bit a byte

    def generate_until(self, requests):
        assert all(request.args[1]["until"] == ["\n"] for request in requests)
        return [f" {'no' if self.wrong else self.words[request.args[0]]}, so" for request in requests]


def _args(request):
    return request.args


@pytest.mark.parametrize("wrong", [False, True])
def test_the_task_files_reward_who_knows(wrong):
    found = harness.evaluate(Knowing(wrong), parse("local"))
    share = 0.0 if wrong else 1.0
    assert (
        found["endings"]["acc"] == found["cloze"]["acc"] == found["cloze_generated"]["exact_match,first_word"] == share
    )
    assert found["cloze"]["perplexity"] == pytest.approx(math.exp(3 if wrong else 1))
    assert found["passages"]["bits_per_byte"] == pytest.approx(1)
    assert [values["examples"] for values in found.values()] == [100, 100, 100, 20]
    assert found["endings"]["acc_stderr"] == 0 and found["cloze"]["perplexity_stderr"] == pytest.approx(0, abs=1e-6)


def test_figures_of_a_model_are_those_of_our_own_evaluator(recurrent):
    model = harness_model(recurrent, piece=256, batch_size=4)
    found = harness.evaluate(model, parse("endings,passages"), limit=6)
    examples = classification.read(classification.DEFAULT, limit=6)
    expected = classification.evaluate(*recurrent, BYTES, examples, piece=256, batch_size=4)
    assert found["endings"]["acc"] == expected["accuracy"]
    assert found["endings"]["acc_norm"] == expected["accuracy_norm"]
    assert found["endings"]["examples"] == 6
    texts = [json.loads(line)["text"] for line in (tasks.FOLDER / "passages.jsonl").read_text().splitlines()[:6]]
    requests = [r for text in texts for r in likelihood.windows(BYTES, text)]
    nats = sum(score.nats for score in likelihood.score(*recurrent, requests, piece=256, batch_size=4))
    bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert found["passages"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    rows = harness.table({"lm_eval": found})
    assert f"{expected['accuracy']:.4f}" in rows and "bits_per_byte" in rows


def run_of(recurrent, **evaluation):
    config = densemamba.get_config().unlock()
    config.evaluation.update(evaluation)
    dataset = types.SimpleNamespace(tokenizer=BYTES)
    model, params = recurrent
    return types.SimpleNamespace(config=config, dataset=dataset, model=model, params=params, mesh=None, batch_size=2)


def test_data_that_cannot_be_had(recurrent, tmp_path):
    """A task of one's own, whose data would come from the network; and a benchmark that lm-eval does not have."""
    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: nobody-at-all/nothing\ntest_split: test\noutput_type: loglikelihood\n"
        'doc_to_text: "{{a}}"\ndoc_to_target: "{{b}}"\nmetadata: {version: 1.0}\n'
    )
    run = run_of(recurrent, tasks="far,quac", task_folder=str(tmp_path))
    harness.check(run.config)
    with pytest.raises(
        UserError, match=r"far is not served: its data cannot be had here: .*; quac is not served"
    ) as error:
        harness.evaluate_run(run, [], None)
    assert "\n" not in str(error.value) and "task_folder" in str(error.value)
    run.config.evaluation.tasks = "far,passages"
    result = harness.evaluate_run(run, [], 2)
    assert "cannot be had" in result["lm_eval"]["far"]["not_served"] and result["lm_eval"]["passages"]["examples"] == 2
    assert "not served: its data" in harness.table(result)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"tasks": " , "}, "config.evaluation.tasks='': name tasks of lm-eval"),
        ({"tasks": "hellaswag@ten"}, "'hellaswag@ten': after @ comes the number"),
        ({"task_folder": "/nowhere"}, "task_folder='/nowhere': is no folder"),
    ],
)
def test_mistakes(recurrent, fields, words):
    with pytest.raises(UserError, match=words):
        harness.check(run_of(recurrent, **fields).config)


def test_lists_of_tasks():
    assert parse("endings, mamba2,piqa@5") == [
        *(("endings", None), ("lambada_openai", None), ("hellaswag", None), ("piqa", None)),
        *(("arc_easy", None), ("arc_challenge", None), ("winogrande", None), ("openbookqa", None)),
    ]
    assert dict(parse("mixcon"))["arc_challenge"] == 25


def test_every_listed_task_is_one_of_lm_evals():
    """Looked for in the folders where they should be: to read all of lm-eval's takes half a minute."""
    folder = Path(lm_eval.tasks.__file__).parent
    names = ("lambada", "hellaswag", "piqa", "arc", "winogrande", "openbookqa", "super_glue", "storycloze", "wsc273")
    names += ("mmlu/default", "bbh/cot_fewshot", "glue", "squadv2", "nq_open")
    folders = [str(folder / name) for name in names] + [str(harness.FOLDER)]
    there = TaskManager(include_path=folders, include_defaults=False).task_index
    listed = {name for tasks in LISTS.values() for name, _ in parse(",".join(tasks))}
    assert listed - there.keys() == set(WITHOUT_FILE)


def test_unknown_tasks_are_refused_with_the_nearest(monkeypatch):
    def local(include_path, include_defaults):
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", local)
    assert harness.Tasks().find("endings")
    assert harness.Tasks().find("quac") is None
    with pytest.raises(UserError, match=r"tasks='endingz': no such task; did you mean endings\?"):
        harness.Tasks().find("endingz")


def test_as_a_command(tmp_path, capsys):
    workdir = make_run(config_for(densemamba, tmp_path), tmp_path / "run")
    argv = ["eval.py", f"--workdir={workdir}", "--evals=lm_eval", "--tasks=endings", "--limit=3"]
    assert cli.run(eval_script.main, eval_script.define, "", argv) == 0
    figures = json.loads((workdir / "eval.json").read_text())["lm_eval"]
    assert figures.keys() == {"endings"} and figures["endings"]["examples"] == 3
    assert f"{figures['endings']['acc']:.4f}" in capsys.readouterr().out and (workdir / "eval.png").exists()
