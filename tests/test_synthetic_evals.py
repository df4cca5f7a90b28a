"""How models are measured on synthetic tasks, from one that knows the answers to one that learns them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from benchmarks import accuracy_by_state
from seqmodels import cli, data
from seqmodels.configs import synthetic
from seqmodels.data.synthetic import make_task
from seqmodels.data.synthetic.dataset import SyntheticSplit
from seqmodels.errors import UserError
from seqmodels.evals import accuracy, needle
from seqmodels.evals.run import load_run
from seqmodels.scripts import eval as evaluation
from seqmodels.training import loop


class Known:
    """A model that says what followed the first 5 of a row: its hidden state is the token that it would say.

    With `forgets`, rows whose first token is even are answered with a 7.
    """

    config = ConfigDict(dict(vocab_size=8, head="next_token"))

    def __init__(self, forgets: bool = False):
        self.forgets = forgets

    def init_state(self, batch, slots):
        return {name: jnp.full((batch,), -1, jnp.int32) for name in ("first", "last", "after")}

    def apply(self, variables, tokens, segment_ids=None, mask=None, state=None, method=None):
        if method == "logits":
            return 9.0 * jax.nn.one_hot(tokens, 8)

        def step(state, token):
            first = jnp.where(state["first"] < 0, token, state["first"])
            after = jnp.where((state["last"] == 5) & (state["after"] < 0), token, state["after"])
            answer = jnp.where(self.forgets & (first % 2 == 0), 7, after)
            return {"first": first, "last": token, "after": after}, answer

        state, answers = jax.lax.scan(step, state, tokens.T)
        return answers.T, state


@pytest.mark.parametrize("piece", [16, 5, 1])
def test_accuracy_of_a_model_that_knows(piece):
    split = SyntheticSplit(make_task("induction", dict(vocab=6)), "test", 0, 16, 50)
    options = dict(length=16, batch_size=8, piece=piece)
    figures = accuracy.evaluate(Known(), {}, split, **options)
    assert figures["loss"] == pytest.approx(np.log(np.exp(9) + 7) - 9, rel=1e-3)
    del figures["loss"]
    assert figures == dict(accuracy=1, sequence_accuracy=1, answers=50, sequences=50)
    firsts = np.concatenate([batch["tokens"][batch["mask"].any(axis=1)][:, 0] for batch in split.windows(16, 8)])
    figures = accuracy.evaluate(Known(forgets=True), {}, split, **options)
    assert figures["accuracy"] == pytest.approx(np.mean(firsts % 2 == 1))


def test_sums_by_row():
    """And with answers of a law: nats beyond its entropy."""
    mask = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]], bool)
    right = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 1]], bool)
    nats = np.array([[1.0, 2.0, 9.0], [9.0, 3.0, 4.0], [9.0, 9.0, 9.0]])
    sums, drawn = accuracy.Tally.empty(3), accuracy.Tally.empty(3)
    sums.add(mask, nats, right)
    assert sums.figures() == dict(loss=2.5, accuracy=0.75, sequence_accuracy=0.5, answers=4, sequences=2)
    for row in range(3):  # row by row: two ids are right in the first, four in the second
        allowed = np.arange(4) < np.full((1, 3, 1), [2, 4, 3][row])
        drawn.add(mask[row : row + 1], nats[row : row + 1], right[row : row + 1], allowed)
    assert drawn.figures() == sums.figures() | {"kl": pytest.approx(2.5 - (np.log(2) + np.log(4)) / 2)}


def test_horizon():
    """The first position at which fewer than nine of ten answers are right, over tests of several lengths."""

    def tally(right, asked):
        return accuracy.Tally(np.array(asked), np.array(right))

    assert accuracy.horizon([tally([10, 9, 9, 8, 10], [10] * 5)]) == 3
    assert accuracy.horizon([tally([10, 10], [10] * 2), tally([20, 19, 18, 30], [20, 20, 20, 20])]) == 4
    assert accuracy.horizon([tally([8, 10], [10] * 2)]) == 0
    at_the_end = [
        tally([0, 0, 10], [0, 0, 10]),
        tally([0] * 5 + [9], [0] * 5 + [10]),
        tally([0] * 8 + [5], [0] * 8 + [10]),
    ]
    assert accuracy.horizon(at_the_end) == 6


class Lawful(Known):
    """Always says id 3, of 8; the head `next_token`."""

    def apply(self, variables, tokens, segment_ids=None, mask=None, state=None, method=None):
        return 50.0 * jax.nn.one_hot(jnp.full_like(tokens, 3), 8) if method == "logits" else (tokens, state)


def test_every_allowed_symbol_is_right():
    split = SyntheticSplit(make_task("regular_language", dict(vocab=6, longest=4)), "test", 0, 20, 30)
    figures = accuracy.evaluate(Lawful(), {}, split, length=20, batch_size=8, piece=7)
    allowed = [batch["allowed"][batch["mask"]][:, 3].mean() * batch["mask"].sum() for batch in split.windows(20, 8)]
    assert figures["accuracy"] == pytest.approx(sum(allowed) / figures["answers"]) and figures["kl"] > 10


def test_needle_in_text():
    tokenizer = data.load_tokenizer("bytes")
    for depth in (0.0, 0.5, 1.0):
        row, answer = needle.text_row(tokenizer, 4321, depth, 600)
        assert len(row) == 601 and answer == 5 and row[0] == tokenizer.separator
        text = tokenizer.decode(row)
        assert text.endswith("What is the pass key? The pass key is 4321")
        room = 600 - len(needle.INTRODUCTION) - len(needle.NEEDLE.format(key=4321)) - len(needle.QUESTION + " 4321")
        assert text.index("\nThe pass key is 4321. Remember it") == len(needle.INTRODUCTION) + round(depth * room)
    batch = needle.text_rows(tokenizer, np.random.default_rng(0), 0.5, 3, 600)
    assert ((batch["targets"] >= 0).sum(axis=1) >= 2).all() and (batch["targets"][:, :590] == -1).all()
    with pytest.raises(UserError, match="a needle and the question for it take"):
        needle.text_row(tokenizer, 4321, 0.5, 200)


def test_needle_counts_rows_by_depth(monkeypatch):
    """A reader that finds the key in the first half only; every try once, whatever the batch."""

    def rows(depth, length, count):
        if length > 50:
            raise UserError("no such row")
        return {"tokens": np.full((count, length), round(depth * 10)), "targets": np.full((count, length), 1)}

    def read_rows(model, params, batch, piece, mesh):
        return None, batch["tokens"] < 5

    monkeypatch.setattr(needle, "read_rows", read_rows)
    options = dict(lengths=[20, 60, 90], tries=3, batch_size=7, piece=4, most=80)
    result = needle.evaluate(None, None, rows, **options)
    assert result["20"]["accuracy"] == [1.0] * 5 + [0.0] * 6
    assert result["60"] == {"not_served": "no such row"} and result["90"] == {"not_served": "the model sees 80 tokens"}
    figures = {"needle": result, "needle_depths": list(needle.DEPTHS)}
    assert "no such row" in needle.table(figures) and "1.00" in needle.table(figures)


def test_accuracy_by_state(tmp_path, capsys, monkeypatch):
    """Seeds of one size are joined; a run without an accuracy is named."""
    for i, (dense, width, seed, right) in enumerate([("none", 32, 0, 0.5), ("none", 32, 1, 0.7), ("read", 64, 0, 0.9)]):
        folder = tmp_path / f"run{i}"
        folder.mkdir()
        config = synthetic.get_config("mqar").unlock()
        config.model.dense.variant, config.model.width, config.seed = dense, width, seed
        (folder / "config.json").write_text(config.to_json())
        (folder / "summary.json").write_text(json.dumps({"parameters": width * 1000}))
        figures = {"accuracy": {"test": right}, "sequence_accuracy": {"test": right**2}, "state_bytes": width * 100}
        figures |= {"horizon": 10 * (i + 1)}
        (folder / "eval.json").write_text(json.dumps(figures))
    (tmp_path / "run0" / "trial.json").write_text(json.dumps({"device": "1 x fake", "commit": "abcdef0"}))
    folders = [str(tmp_path / f"run{i}") for i in range(3)]
    monkeypatch.setattr("sys.argv", ["accuracy_by_state.py", *folders, f"--out={tmp_path}/out"])
    accuracy_by_state.main()
    text = (tmp_path / "out.md").read_text()
    assert "| mamba | 32 | 32,000 | 3,200 | 2 | 0.6000 (0.5000 to 0.7000) | 0.3700 (0.2500 to 0.4900) |" in text
    assert "| mamba, dense read | 64 | 64,000 | 6,400 | 1 | 0.9000 | 0.8100 |" in text
    assert ", 1 x fake, commit abcdef0. Seeds: 0, 1." in text
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("sys.argv", ["accuracy_by_state.py", *folders, "--figure=horizon", f"--out={tmp_path}/out"])
    monkeypatch.setattr(accuracy_by_state, "plot", lambda *arguments: None)
    accuracy_by_state.main()
    text = (tmp_path / "out.md").read_text()
    assert "| 3,200 | 2 | 15 (10 to 20) | 0.6000 (0.5000 to 0.7000) |" in text and "--figure=horizon --out" in text
    (tmp_path / "run1" / "eval.json").unlink()
    with pytest.raises(SystemExit):
        accuracy_by_state.main()
    assert f"python eval.py --workdir={folders[1]}" in capsys.readouterr().err


# The whole way


def tiny(arg, **changes):
    config = synthetic.get_config(arg).unlock()
    config.update_from_flattened_dict({"metrics.every": 20, "mesh.data": 1, **changes})
    return config


def test_a_sample_needs_a_prompt(tmp_path):
    """Said before training rather than after it."""
    with pytest.raises(UserError, match=r"config\.sample\.prompt='': must hold a token"):
        loop.train(tiny("induction", **{"sample.tokens": 4}), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_mamba_learns_induction_and_keeps_it_at_other_lengths(tmp_path, capsys):
    changes = {"steps": 120, "batch_size": 32, "data.rows": 128, "data.lengths": (16, 40)}
    changes |= {"evaluation.every": 60, "checkpoint.every": 120}
    config = tiny("induction,length=16,vocab=6,width=32", **changes)
    summary = loop.train(config, tmp_path)
    assert summary["splits"]["test"]["accuracy"] > 0.9
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation_accuracy" in row] == [60, 120]
    assert "answers right" in capsys.readouterr().out

    figures = json.loads((tmp_path / "eval.json").read_text())  # config.evals is "accuracy"
    assert figures["accuracy"]["test"] == summary["splits"]["test"]["accuracy"]
    assert list(figures["accuracy_by_test"]) == ["16", "40"] and figures["state_bytes"] > 0
    assert figures["accuracy_by_test"]["16"]["accuracy"] == figures["accuracy"]["test"]
    assert figures["accuracy_by_test"]["40"]["accuracy"] > 0.5  # chance is 0.2

    # the same rows read in one piece, and in pieces that do not divide them
    run = load_run(tmp_path)
    measure = dict(length=40, batch_size=32, limit=64, mesh=run.mesh)
    whole, parts = (
        accuracy.evaluate(run.model, run.params, run.dataset["test"], piece=piece, **measure) for piece in (40, 12)
    )
    assert whole["accuracy"] == parts["accuracy"] and whole["loss"] == pytest.approx(parts["loss"], rel=1e-4)

    args = ["eval.py", f"--workdir={tmp_path}", "--evals=perplexity"]
    assert cli.run(evaluation.main, evaluation.define, "", args) == 1
    assert "--evals=perplexity: does not fit this run; accuracy" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arg", "figure"), [("compression,length=6", ""), ("regular_language,length=12", "kl"), ("word_problem", "horizon")]
)
def test_new_figures_of_a_run(tmp_path, arg, figure):
    """Of models of any skill: a run whose head rebuilds rows, one with several right answers, one with a horizon."""
    changes = {"steps": 2, "batch_size": 8, "data.rows": 16, "data.lengths": (12,) if figure else (), "mesh.data": 1}
    config = tiny(f"{arg},width=16,layers=1,mixer=mingru", **changes | {"evaluation.every": 2, "checkpoint.every": 2})
    summary = loop.train(config, tmp_path)
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert summary["splits"]["test"]["accuracy"] == figures["accuracy"]["test"]
    assert set(figures) & {"kl", "horizon"} == ({figure} if figure else set())
    if figure == "horizon":
        assert 0 <= figures["horizon"] <= 12
    if figure == "kl":
        assert 0 < figures["kl"]["test"] < figures["loss"]["test"]


@pytest.mark.slow
def test_passkey_and_attention_from_training_to_the_heat_map(tmp_path):
    changes = {
        "steps": 2,
        "batch_size": 8,
        "data.rows": 16,
        "data.lengths": (48, 96),
        "checkpoint.every": 2,
        "evals": "",
    }
    config = tiny("passkey,length=48,width=16,layers=1,mixer=transformer", **changes)
    loop.train(config, tmp_path)
    args = ["eval.py", f"--workdir={tmp_path}", "--limit=2"]
    assert cli.run(evaluation.main, evaluation.define, "", args) == 0
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert list(figures["needle"]) == ["48", "96"] and len(figures["needle"]["96"]["accuracy"]) == 11
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
