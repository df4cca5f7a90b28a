"""Rows are classified, regressed and forecast, from tokens and frames: trained, measured and resumed in miniature."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from seqmodels import evals
from seqmodels.configs import mamba
from seqmodels.errors import UserError
from seqmodels.evals.figures import batch_sums
from seqmodels.evals.run import load_run
from seqmodels.model import build, build_for
from seqmodels.training import loop, metrics, sharding
from seqmodels.training.state import abstract_params
from tests.array_data import ArrayDataset, channel_means, lengths, waves, which_channel, which_token
from tests.overrides import with_fields

pytestmark = pytest.mark.slow


def tiny(**overrides):
    config = mamba.get_config().unlock()
    config.steps, config.batch_size, config.seq_len, config.model.width, config.model.repeats = 30, 16, 12, 16, 1
    config.mesh.data, config.checkpoint.every, config.metrics.tensorboard = 1, 100, False
    config.optimizer.learning_rate, config.optimizer.schedule, config.optimizer.warmup = 0.02, "constant", 2.0
    return with_fields(config, overrides)


def losses(workdir):
    return [row["loss"] for row in metrics.read(workdir / "metrics.jsonl") if "loss" in row]


@pytest.mark.slow
def test_classify_tokens_resumes_bit_for_bit(tmp_path):
    """With validations, and stopped in the middle; then read again by an evaluation."""
    data = ArrayDataset("classify", which_token, 16, {"tokens": 3, "labels": 2})
    options = dict(model__head="classify", evaluation__every=10, evaluation__rows=16, model__dropout=0.1)
    config = tiny(**options, checkpoint__every=12)
    summary = loop.train(config, tmp_path / "whole", data)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "summary.json").unlink()
    for step in (24, 30):  # as if it had been killed before
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / str(step))
    assert loop.train(config, tmp_path / "parts", data)["splits"] == summary["splits"]
    values = losses(tmp_path / "whole")
    assert values == losses(tmp_path / "parts") and len(values) == 30
    assert np.mean(values[-5:]) < 0.5 * np.mean(values[:5])
    rows = [row for row in metrics.read(tmp_path / "whole" / "metrics.jsonl") if "validation_loss" in row]
    assert [row["step"] for row in rows] == [10, 20, 30] and rows[-1]["validation_accuracy"] > 0.75
    assert list(summary["splits"]["test"]) == ["loss", "accuracy"] and summary["sample"] == ""

    run = load_run(tmp_path / "whole", dataset=data)
    assert evals.default(run) == ["figures"]
    figures = evals.EVALUATORS["figures"].evaluate_run(run, ["validation", "test"], None)
    assert figures["accuracy"]["test"] == pytest.approx(summary["splits"]["test"]["accuracy"])
    assert "test" in evals.EVALUATORS["figures"].table(figures)
    for name in ("perplexity", "throughput", "needle", "accuracy"):
        with pytest.raises(UserError, match=f"--evals={name}: does not fit this run; figures do"):
            evals.check(evals.find([name]), run)


def with_gaps(rng, count):
    """The same, where a tenth of the values is missing, and NaN."""
    batch = channel_means(rng, count)
    observed = rng.random(batch["values"].shape) < 0.9
    return batch | {"values": np.where(observed, batch["values"], np.nan).astype(np.float32), "observed": observed}


@pytest.mark.parametrize(
    "objective, make, fields, falls",
    [
        ("classify", which_channel, dict(model__pool="attention"), 0.6),
        ("regress", with_gaps, dict(model__pattern="bi:mamba", training__accumulate=2, model__observed=True), 0.5),
        ("forecast", waves, dict(model__horizon=3), 0.3),
    ],
)
def test_frames(tmp_path, objective, make, fields, falls):
    """NaN in the padding, and in values that are not observed, never shows."""
    data = ArrayDataset(objective, make, 16, {"labels": 2})
    config = tiny(model__head=objective, model__input="frames", evals="figures", **fields)
    summary = loop.train(config, tmp_path / "run", data)
    values = losses(tmp_path / "run")
    assert np.isfinite(values).all() and np.mean(values[-5:]) < falls * np.mean(values[:5])
    extra = {"classify": ["accuracy"], "regress": [], "forecast": ["mae"]}[objective]
    assert list(summary["splits"]["validation"]) == ["loss", *extra]
    figures = json.loads((tmp_path / "run" / "eval.json").read_text())
    for name in ("loss", *extra):
        assert figures[name]["test"] == pytest.approx(summary["splits"]["test"][name], rel=1e-6)


def letters(rng, count, length=12):
    """Two letters in turn, and sometimes one that is not known (id 2); padding in front of the row."""
    mask = lengths(rng, count, length)[:, ::-1]
    tokens = (np.arange(length + 1) + rng.integers(2, size=(count, 1))) % 2
    unknown = rng.random((count, length)) < 0.1
    padding = rng.integers(2, size=(count, length))
    inputs = np.where(mask, np.where(unknown, 2, tokens[:, :-1]), padding)
    arrays = {"tokens": inputs, "targets": np.where(mask, tokens[:, 1:], -1), "segment_ids": 0 * inputs}
    return {name: array.astype(np.int32) for name, array in arrays.items()} | {"mask": mask}


@pytest.mark.slow
def test_next_tokens_with_padding(tmp_path):
    """One-hot letters. What stands in the padding before a row changes nothing in it."""
    data = ArrayDataset("next_token", letters, 16, {"tokens": 2, "targets": 2})
    config = tiny(model__input="one_hot", model__tie_embeddings=False, steps=12)
    summary = loop.train(config, tmp_path / "run", data)
    values = losses(tmp_path / "run")
    found = summary["splits"]["test"]
    assert np.mean(values[-3:]) < 0.5 * values[0] and list(found) == ["loss", "bits"]
    assert found["bits"] == pytest.approx(found["loss"] / np.log(2))
    run = load_run(tmp_path / "run", dataset=data)
    batch = data.batch(99)
    other = batch | {"tokens": np.where(batch["mask"], batch["tokens"], 1 - batch["tokens"])}
    sums = [batch_sums(run.model, run.params, rows) for rows in (batch, other)]
    assert float(sums[0].nats) == float(sums[1].nats) and float(sums[0].count) == batch["mask"].sum()


@pytest.mark.slow
def test_example_of_the_page(tmp_path, monkeypatch):
    """docs/training.md's dataset of one's own."""
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(example.replace("= 50, 16, 32", "= 2, 16, 32"), {})
    assert len(losses(tmp_path / "runs" / "sums")) == 2


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(), "config.model.head='next_token': must be 'classify'"),
        (dict(model__head="classify", training__bptt=True), "config.training.bptt=True: must be False with"),
        (
            dict(model__head="classify", seq_len=24),
            r"dataset.spec\['tokens'\].shape=\(16, 12\): must begin with \(16, 24\)",
        ),
        (
            dict(model__head="classify", batch_size=8),
            r"dataset.spec\['tokens'\].shape=\(16, 12\): must begin with \(8, ",
        ),
        (dict(model__head="classify", checkpoint__best="validation_accuracy"), "must be validation_loss"),
        (
            dict(model__head="classify", evals="perplexity"),
            "config.evals=perplexity: does not fit this run; figures do",
        ),
    ],
)
def test_bad_input_before_anything_is_made(tmp_path, fields, words):
    data = ArrayDataset("classify", which_token, 16, {"tokens": 3, "labels": 2})
    with pytest.raises(UserError, match=words):
        loop.train(tiny(**fields), tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


def test_a_language_model_lends_all_but_its_head():
    """Embedding, blocks and norm have the same names and shapes in a classifier of the same tokens."""

    def shapes(model):
        boxed = abstract_params(model, tiny())
        return jax.tree.map(lambda leaf: leaf.value.shape, boxed, is_leaf=sharding.is_box)

    data = ArrayDataset("classify", which_token, 16, {"tokens": 3, "labels": 2})
    classifier = shapes(build_for(tiny(model__head="classify").model, data))
    del classifier["classify"]
    assert classifier == shapes(build(tiny().model, 3))
