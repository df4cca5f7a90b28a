"""Evaluators that a config names run at the end of training, and find what eval.py finds."""

import json

import pytest

from seqmodels import cli
from seqmodels.errors import UserError
from seqmodels.scripts import eval as eval_script
from seqmodels.training import loop, metrics
from tests.run_fixtures import tiny, write_text

pytestmark = pytest.mark.slow

ENDINGS = '{"prompt": "It is 3", "choices": [" o\'clock", " x"], "answer": 0}\n'


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.slow
def test_evaluators_at_the_end_of_training(tmp_path, text, capsys):
    (tmp_path / "clock.jsonl").write_text(ENDINGS)
    fields = dict(evaluation__lengths=(1, 2), evaluation__classification=str(tmp_path / "clock.jsonl"))
    config = tiny(text, steps=3, evals="context_lengths,classification", **fields)
    summary = loop.train(config, tmp_path / "run")
    said = capsys.readouterr().out
    figures = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert figures["step"] == summary["steps"] == 3 and figures["name"] == "mamba"
    assert figures["context_lengths"].keys() == {"validation", "test"}
    assert figures["context_lengths"]["test"].keys() == {"16", "32"}
    assert "clock" in figures["classification"] and f"{figures['classification']['clock']['accuracy']:.4f}" in said
    assert (tmp_path / "run" / "eval.png").exists()
    row = metrics.read(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["step"] == 3
    assert row["eval.context_lengths.test.32.loss"] == figures["context_lengths"]["test"]["32"]["loss"]
    assert row["eval.classification.clock.accuracy"] == figures["classification"]["clock"]["accuracy"]

    argv = ["eval.py", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'again.json'}"]
    assert cli.run(eval_script.main, eval_script.define, "", argv) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again.keys() == figures.keys()
    for split in ("validation", "test"):
        for length in ("16", "32"):
            found = again["context_lengths"][split][length]["loss"]
            assert found == pytest.approx(figures["context_lengths"][split][length]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(evals="perplexty"), "config.evals=perplexty: must be one of perplexity, "),
        (dict(evals="accuracy"), "config.evals=accuracy: does not fit this run"),
        (dict(evals="classification", evaluation__classification="/none/*"), "'/none/.': matches no file"),
    ],
)
def test_mistakes_are_refused_before_anything_is_compiled(tmp_path, text, capsys, fields, words):
    with pytest.raises(UserError, match=words):
        loop.train(tiny(text, **fields), tmp_path / "run")
    assert "compiled" not in capsys.readouterr().out and not (tmp_path / "run").exists()
