"""Questions about a text: prompts, answers a token at a time, and scores against those of transformers."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.configs import densemamba
from seqmodels.errors import UserError
from seqmodels.evals import qa
from seqmodels.evals.qa import Question
from tests.likelihood_models import BYTES, model_and_params, step

SHOT = Question("What is red?", ["Blood", "Wine"], "Blood is red.")
WHOLE = Question("What is blue?", ["the sky"], "The sky is blue.", "It is", (SHOT, SHOT))


def text_of(question, **options):
    ids, cut = qa.prompt_of(BYTES, question, **{"shots": 0, "repeat": 1, "length": None} | options)
    assert ids[0] == BYTES.separator
    return BYTES.decode(ids[1:]), cut


def test_prompts():
    asked = "The sky is blue.\n\nWhat is blue?\nIt is"
    shot = "Blood is red.\n\nWhat is red?\nAnswer: Blood\n\n"
    assert text_of(WHOLE) == (asked, False)
    assert text_of(WHOLE, shots=1) == (shot + asked, False)
    assert text_of(WHOLE, shots=3) == (2 * shot + asked, False)
    assert text_of(WHOLE, repeat=2) == (f"{asked}\n\n{asked}", False)
    assert text_of(Question("Why?", ["x"])) == ("Why?\nAnswer:", False)


def test_the_end_of_a_long_context_is_cut():
    for repeat in (1, 2):
        whole = len(qa.prompt_of(BYTES, WHOLE, shots=1, repeat=repeat, length=None)[0])
        assert text_of(WHOLE, shots=1, repeat=repeat, length=whole)[1] is False
        text, cut = text_of(WHOLE, shots=1, repeat=repeat, length=whole - 5 * repeat)
        assert cut and len(text) == whole - 1 - 5 * repeat and text.count("The sky is \n\nWhat is blue?") == repeat
    with pytest.raises(UserError, match="a prompt without its context has more than 20 tokens: 'What is blue"):
        text_of(WHOLE, length=20)


@pytest.mark.slow
def test_answers_are_those_a_token_at_a_time():
    """Greedy, up to the end of the line, whatever other questions are answered beside."""
    model, params = model_and_params(densemamba)
    questions = [WHOLE, Question("One", ["two"]), SHOT]
    found = qa.evaluate(model, params, BYTES, questions, tokens=6, batch_size=2)
    expected = []
    for question in questions:
        state, out = model.init_state(1, 64), []
        for token in qa.prompt_of(BYTES, question, shots=0, repeat=1, length=None)[0]:
            logits, state = step(model, params, jnp.int32(token), state)
        while len(out) < 6 and (token := int(jnp.argmax(logits[:257]))) != BYTES.separator:
            out.append(token)
            logits, state = step(model, params, jnp.int32(token), state)
        expected.append(BYTES.decode(out).split("\n")[0])
    assert found["answers"] == expected and found["examples"] == 3 and found["cut"] == 0
    rows = [qa.scores(text, question.answers) for text, question in zip(expected, questions, strict=True)]
    for name in qa.METRICS:
        np.testing.assert_allclose(found[name], np.mean([row[name] for row in rows]))
    said = qa.table({"qa": {"mine": found}})
    assert re.search(r"mine .* 3$", said) and "contains" in said


def test_scores_are_squads():
    squad = pytest.importorskip("lm_eval.tasks.qasper.metrics")  # has the script of SQuAD 1.1
    rng = np.random.default_rng(0)
    words = ["The", "sky,", "a", "blue", "BLUE.", "is", "an", "old-sea", "(7)", ""]
    for _ in range(300):
        answer, *references = (" ".join(rng.choice(words, rng.integers(0, 6))) for _ in range(3))
        ours = qa.scores(answer, references)
        assert qa.normal(answer) == squad.normalize_answer(answer)
        assert ours["exact_match"] == any(
            squad.normalize_answer(r) == squad.normalize_answer(answer) for r in references
        )
        np.testing.assert_allclose(ours["f1"], max(squad.f1_abstractive([answer], [r]) for r in references))


def test_contains_and_share():
    scores = qa.scores("The keys are 12 and 34.", ["12", "56"])
    assert scores["contains"] == 1 and scores["share"] == 0.5 and scores["exact_match"] == 0
    assert qa.scores("PARIS it is", ["Paris"])["contains"] == 1 and qa.scores("", ["x"])["share"] == 0


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no question"),
        ("{", r"q.jsonl:1: must be a JSON object with question and answers"),
        (json.dumps(dict(question="a")), "must be a JSON object with question and answers"),
        (json.dumps(dict(question="a", answers=[])), "each of the answers must be a string"),
        (json.dumps(dict(question="a", answers=[1])), "each of the answers must be a string"),
        (json.dumps(dict(question="a", answers=["b"], contxt="c")), "has the key 'contxt'; allowed are question"),
        (json.dumps(dict(text="a", value=1)), "each of the answers must be a string"),
        (
            json.dumps(dict(input="a", instructions=["b", "c"], outputs=["d"])),
            "has 2 instructions and 1 outputs; must be as many",
        ),
        (json.dumps(dict(question="a", answers=["b"], shots=[{}])), "must be a JSON object with question and answers"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, message):
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        qa.read(path)
    assert "\n" not in str(error.value)


def test_files(tmp_path):
    config = densemamba.get_config().copy_and_resolve_references()
    with pytest.raises(UserError, match=r"config\.evaluation\.qa='': matches no file"):
        qa.check(config)
    path = tmp_path / "q.jsonl"
    path.write_text(
        "\n".join([json.dumps(dict(question="a", answers=["b"], shots=[dict(question="c", answers=["d"])]))] * 3)
    )
    with config.unlocked():
        config.evaluation.qa = str(tmp_path / "*.jsonl")
    qa.check(config)
    assert qa.read(path, limit=2) == 2 * [Question("a", ["b"], shots=(Question("c", ["d"]),))]


def test_lines_of_based_and_of_l_eval(tmp_path):
    """Based's prompt is its text and nothing else, as in lm-eval (swde, fda, squad_completion)."""
    based = dict(text=" Trade name: \n", value=" Blue \n", key="Trade name", doc_id="1", file_name="f.html")
    leval = dict(instructions=["When?", "Who?"], outputs=["1851", "Ahab"], input="A whale.", evaluation="f1")
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(based) + "\n" + json.dumps(leval))
    whole = Question("Trade name:", ["Blue"], answer_prefix="")
    when, who = Question("When?", ["1851"], "A whale."), Question("Who?", ["Ahab"], "A whale.")
    assert qa.read(path) == [whole, when, who]
    assert qa.read(path, limit=2)[1:] == [when]
    assert [text_of(q)[0] for q in qa.read(path, limit=2)] == ["Trade name:", "A whale.\n\nWhen?\nAnswer:"]
    assert text_of(qa.read(path)[0], repeat=2) == ("Trade name:\n\nTrade name:", False)
