"""Evaluators against sums that are written out here, in float64, one window at a time."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from seqmodels import evals
from seqmodels.config import validate
from seqmodels.configs import densemamba, mamba, transformer
from seqmodels.data import TokenSplit
from seqmodels.data.sizes import Sizes
from seqmodels.errors import UserError
from seqmodels.evals import by_position, context_lengths, extrapolation, memory, perplexity, report, scoring
from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.model import build
from seqmodels.training.sharding import AXES, RULES, unbox

VOCAB = 257
T = 16


@pytest.fixture(scope="module")
def model_and_params():
    config = densemamba.get_config().model.unlock()
    config.update(width=16, repeats=2, pattern="mamba")
    config.dense.bottleneck = 8
    model = build(config, VOCAB)
    params = unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    return model, jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), params)


@pytest.fixture(scope="module")
def split():
    """Three documents, 101 tokens: 100 targets, six rows of 16 and one of 4. Of bytes it has fewer than tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 128, 101).astype(np.uint16)
    documents = np.array([0, 41, 70])
    tokens[documents] = 256
    return TokenSplit(tokens, documents, bytes=96)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens, segment_ids):
    hidden, _ = model.apply({"params": params}, tokens, segment_ids=segment_ids)
    return model.apply({"params": params}, hidden, method="logits")


def token_nats(model, params, tokens, targets, segment_ids):
    """Nats of one row, by NumPy in float64 from the model's logits."""
    logits = np.asarray(logits_of(model, params, tokens[None], segment_ids[None]), np.float64)[0]
    largest = logits.max(axis=-1, keepdims=True)
    log_z = np.log(np.exp(logits - largest).sum(axis=-1)) + largest[:, 0]
    return log_z - logits[np.arange(len(targets)), targets]


@pytest.fixture(scope="module")
def nats(model_and_params, split):
    """[100] float64: nats of every target of the split, in rows of T."""
    ids = np.searchsorted(split.documents, np.arange(101), side="right") - 1
    result = []
    for start in range(0, 100, T):
        row = np.zeros((3, T), np.int32)
        stop = min(start + T, 100)
        row[:, : stop - start] = split.tokens[start:stop], split.tokens[start + 1 : stop + 1], ids[start:stop]
        row[2, stop - start :] = row[2, stop - start - 1]
        result.append(token_nats(*model_and_params, *row)[: stop - start])
    return np.concatenate(result)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_perplexity_counts_every_target_once(model_and_params, split, nats, batch_size):
    figures = perplexity.evaluate(*model_and_params, split, length=T, batch_size=batch_size)
    assert (figures["tokens"], figures["bytes"]) == (100, 96)
    np.testing.assert_allclose(figures["loss"], nats.mean(), rtol=1e-5)
    np.testing.assert_allclose(figures["perplexity"], np.exp(nats.mean()), rtol=1e-5)
    np.testing.assert_allclose(figures["bits_per_byte"], nats.sum() / np.log(2) / 96, rtol=1e-5)


def test_a_limit_counts_its_own_bytes(model_and_params, split, nats):
    run = dict(length=T, batch_size=2, limit=3)  # rows 0, 2 and 4 of 7, the last of which is not whole
    read = np.concatenate([np.arange(row * T, (row + 1) * T) for row in (0, 2, 4)])
    rng = np.random.default_rng(1)
    sizes = rng.integers(0, 3, len(split.tokens)).astype(np.uint8)
    wide = np.array([[48, 1000], [49, 5000]])
    exact = perplexity.evaluate(*model_and_params, dataclasses.replace(split, sizes=Sizes(sizes, wide)), **run)
    assert (exact["tokens"], exact["bytes"]) == (48, sizes[read + 1].sum() + 1000)
    np.testing.assert_allclose(exact["loss"], nats[read].mean(), rtol=1e-5)
    np.testing.assert_allclose(exact["bits_per_byte"], nats[read].sum() / np.log(2) / exact["bytes"], rtol=1e-5)
    average = perplexity.evaluate(*model_and_params, split, **run)  # a cache of an earlier version
    assert average["bytes"] == round(96 * 48 / 100)


def test_a_uniform_model_needs_the_logarithm_of_the_vocabulary(model_and_params, split):
    model, params = model_and_params
    uniform = dict(params, embedding=jnp.zeros_like(params["embedding"]))
    figures = perplexity.evaluate(model, uniform, split, length=T, batch_size=8)
    assert figures["perplexity"] == pytest.approx(264, rel=1e-5)  # the padded vocabulary
    assert figures["bits_per_byte"] == pytest.approx(math.log2(264) * 100 / 96, rel=1e-5)


def test_logits_in_chunks_change_nothing(model_and_params, split, monkeypatch):
    whole = scoring.position_sums(*model_and_params, split, length=48, batch_size=1)
    scoring.score.clear_cache()
    monkeypatch.setattr(scoring, "LOGIT_TOKENS", 20)  # 48 = 20 + 20 + 8
    chunked = scoring.position_sums(*model_and_params, split, length=48, batch_size=1)
    scoring.score.clear_cache()
    np.testing.assert_allclose(chunked.nats, whole.nats, rtol=1e-5)
    assert (chunked.tokens == whole.tokens).all()


def test_rows_spread_over_devices(model_and_params, split, nats):
    mesh = jax.make_mesh((2, 1, 4, 1, 1), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 5)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        figures = perplexity.evaluate(*model_and_params, split, length=T, batch_size=3, mesh=mesh)  # 8 rows at once
    assert figures["tokens"] == 100
    np.testing.assert_allclose(figures["loss"], nats.mean(), rtol=1e-5)


def test_loss_by_position(model_and_params, split, nats):
    sums = scoring.position_sums(*model_and_params, split, length=T, batch_size=8)
    result = by_position.by_position(sums)
    assert (result["first"], result["last"]) == ([0, 1, 2, 4, 8], [0, 1, 3, 7, 15])
    rows = [nats[start : start + T] for start in range(0, 100, T)]
    for first, last, loss in zip(result["first"], result["last"], result["loss"], strict=True):
        np.testing.assert_allclose(loss, np.concatenate([row[first : last + 1] for row in rows]).mean(), rtol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 16, 100, 257])
def test_buckets_cover_every_position_once(length):
    spans = by_position.buckets(length)
    assert [p for first, end in spans for p in range(first, end)] == list(range(length))


def test_longer_contexts_predict_the_same_tokens(model_and_params, split):
    model, params = model_and_params
    lengths = [T, 2 * T, 8 * T]
    result = context_lengths.evaluate(model, params, split, lengths=lengths, piece=8, scored=8, batch_size=2, limit=99)
    ids = split.segment_ids(0, 100)
    for length in lengths[:2]:
        expected = []
        for end in (32, 64, 96):  # rows of 32
            part = slice(end - length, end)
            row = split.tokens[part].astype(int), split.tokens[end - length + 1 : end + 1].astype(int), ids[part]
            expected.append(token_nats(model, params, *row)[-8:])
        np.testing.assert_allclose(result[str(length)]["loss"], np.mean(expected), rtol=1e-5)
        assert result[str(length)]["tokens"] == 24
    text = split.tokens.astype(int)
    everything = [
        token_nats(model, params, text[s : s + 32], text[s + 1 : s + 33], ids[s : s + 32]) for s in (0, 32, 64)
    ]
    by_position = result["32"]["by_position"]
    assert (by_position["first"], by_position["last"]) == ([0, 1, 2, 4, 8, 16], [0, 1, 3, 7, 15, 31])
    for first, last, loss in zip(*by_position.values(), strict=True):
        np.testing.assert_allclose(loss, np.mean(everything, axis=0)[first : last + 1].mean(), rtol=1e-5)
    assert "101 tokens, a row needs 129" in result["128"]["not_served"]


def test_what_a_model_cannot_do_is_said_and_what_is_broken_is_raised(model_and_params, split, monkeypatch):
    def failing(error):
        def score(model, params, batch, piece, mesh):
            if batch["tokens"].shape[1] > T:
                raise error
            return np.ones(batch["tokens"].shape), None

        monkeypatch.setattr(context_lengths, "score_long", score)
        return context_lengths.evaluate(
            *model_and_params, split, lengths=[T, 48], piece=T, scored=8, batch_size=2, limit=9
        )

    assert failing(UnsupportedError("at most 16"))["48"] == {"not_served": "at most 16"}
    result = failing(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
    assert "out of memory" in result["48"]["not_served"] and result["16"]["loss"] == 1.0
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())


def test_a_recurrent_models_memory_does_not_grow_with_the_context(model_and_params, split):
    def read(pieces):
        context_lengths.evaluate(
            *model_and_params, split, lengths=[T * pieces], piece=T, scored=8, batch_size=1, limit=1
        )
        return scoring._compiled.cache_info().misses

    assert read(1) == read(6)  # one program, of one piece and a state of one size


def attention_model():
    config = transformer.get_config().model.unlock()
    config.update(width=16, repeats=2)
    config.attention.heads, config.mlp.hidden = 2, 16
    model = build(config, VOCAB)
    params = unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    return model, jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), params)


def test_a_transformer_is_read_in_pieces_as_far_as_memory_allows(split, monkeypatch):
    model, params = attention_model()
    run = functools.partial(
        context_lengths.evaluate, model, params, split, lengths=[48], piece=T, scored=8, batch_size=2, limit=9
    )
    text, ids = split.tokens.astype(int), split.segment_ids(0, 100)
    expected = [token_nats(model, params, text[s : s + 48], text[s + 1 : s + 49], ids[s : s + 48]) for s in (0, 48)]
    figures = run()["48"]
    np.testing.assert_allclose(figures["loss"], np.mean([nats[-8:] for nats in expected]), rtol=1e-5)
    np.testing.assert_allclose(figures["by_position"]["loss"][0], np.mean([nats[0] for nats in expected]), rtol=1e-5)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 2**14)
    assert run()["48"]["not_served"].startswith("needs 0.0 GiB of memory, 0.0 are free")


class FakeRun:
    """A run whose figures are known."""

    measured_by = "perplexity"  # of the dataset, which it is too

    def __init__(self, model_and_params, split, config=None):
        self.config = densemamba.get_config().unlock() if config is None else config
        self.config.seq_len = T if config is None else config.seq_len
        self.model, self.params = model_and_params
        self.dataset, self.mesh, self.batch_size = self, None, 2
        self.split = split

    def __getitem__(self, name):
        return self.split

    def xz_bits_per_byte(self, split):
        return 2.5

    def position_sums(self, split, limit):
        return scoring.position_sums(self.model, self.params, self.split, length=T, batch_size=2, limit=limit)


def by_value(figures):
    """The numbers that are not counts, in any nesting."""
    if isinstance(figures, float):
        yield figures
    elif isinstance(figures, dict | list):
        for value in figures.values() if isinstance(figures, dict) else figures:
            yield from by_value(value)


def test_every_evaluator_gives_json_a_table_and_a_picture(model_and_params, split, tmp_path):
    run, figures = FakeRun(model_and_params, split), {}
    evaluators = evals.find(evals.default(run))
    assert list(evaluators) == ["perplexity", "loss_by_position", "context_lengths"]
    for name, evaluator in evaluators.items():
        result = evaluator.evaluate_run(run, ["validation", "test"], None)
        assert name in result and not result.keys() & figures.keys()
        assert result[name].keys() == {"validation", "test"}
        loss = next(iter(by_value(result[name]["test"])))
        assert f"{loss:.4f}" in evaluator.table(result)
        figures |= result
    report.write_json(tmp_path / "deep" / "eval.json", figures)
    assert json.loads((tmp_path / "deep" / "eval.json").read_text()) == figures
    assert report.plot(tmp_path / "eval.png", evaluators, figures, "title")
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")


def test_an_evaluator_that_cannot_serve_does_not_keep_the_others_from_it(model_and_params, split, tmp_path):
    class Refusing:
        @staticmethod
        def evaluate_run(run, splits, limit):
            raise UserError("no data")

    run, said = FakeRun(model_and_params, split), []
    run.step, evaluators = 3, {"broken": Refusing, "loss_by_position": by_position}
    out = tmp_path / "eval.json"
    figures, failed = report.evaluate(run, evaluators, splits=["test"], limit=1, out=out, say=said.append)
    assert failed == ["broken: no data"] and json.loads(out.read_text()) == figures
    assert (figures["step"], figures["limit"]) == (3, 1) and out.with_suffix(".png").exists()
    assert said[0] == "densemamba, step 3, contexts of 16 tokens" and "position" in said[1]


def test_scalars_are_the_numbers_by_dotted_name():
    figures = {"name": "x", "step": 3, "loss": {"test": 2.5, "more": [1, 2]}, "limit": None}
    assert dict(report.scalars(figures)) == {"eval.step": 3, "eval.loss.test": 2.5}


def test_names_in_a_config():
    config = densemamba.get_config()
    assert evals.named(config) == []
    config.evals = "perplexity, lm_eval"
    assert evals.named(config) == ["perplexity", "lm_eval"]


def test_lm_eval_is_missed_by_name(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lm-eval is not installed; pip install -r requirements-eval.txt"):
        evals.EVALUATORS["lm_eval"].check(densemamba.get_config())


def test_evaluators_that_do_not_fit_a_run_are_refused(model_and_params, split):
    run = FakeRun(model_and_params, split)
    evals.check(evals.find(["perplexity"]), run)
    with pytest.raises(UserError, match=r"config\.evals=accuracy: does not fit this run; perplexity, "):
        evals.check(evals.find(["accuracy"]), run, "config.evals")


def test_unknown_evaluators_and_unwritable_files(tmp_path):
    with pytest.raises(UserError, match="--evals=perplexty: must be one of perplexity, "):
        evals.find(["perplexty"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        report.write_json(tmp_path / "file" / "eval.json", {})


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["mamba", "attention"])
def test_extrapolation_measures_the_model_that_each_method_makes(split, pattern):
    """Against the model built from a config with the method's fields, read in one piece."""
    config = transformer.get_config() if pattern == "attention" else mamba.get_config()
    config.model.unlock().update(width=16, repeats=1, pattern=pattern)
    config.unlock().update(seq_len=8)
    methods = ["none", "dynamic", "yarn", "rerope", "log_n", "window"] if pattern == "attention" else ["none", "dt"]
    config.evaluation.update(extrapolate=",".join(methods), lengths=(1, 4), rows=3)
    model = build(config.model, VOCAB)
    params = unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    run = FakeRun((model, params), split, config)
    extrapolation.check(config)
    result = extrapolation.evaluate_run(run, ["test"], None)
    by_method = result["extrapolation"]["test"]
    assert list(by_method) == methods
    fields = {
        "none": {},
        "dynamic": dict(scaling="ntk", scaling_factor=4.0),
        "yarn": dict(scaling="yarn", scaling_factor=4.0, trained_length=8),
        "rerope": dict(scaling="rerope", trained_length=8),
        "log_n": dict(log_n=8),
        "window": dict(window=8),
        "dt": dict(dt_scale=0.25),
    }
    ids, text, losses = split.segment_ids(0, 100), split.tokens.astype(int), {}
    for method in methods:
        other = config.model.copy_and_resolve_references()
        other[pattern].update(fields[method])
        made = build(other, VOCAB)
        rows = [(text[s : s + 32], text[s + 1 : s + 33], ids[s : s + 32]) for s in (0, 32, 64)]
        losses[method] = np.mean([token_nats(made, params, *row)[-4:] for row in rows])
        np.testing.assert_allclose(by_method[method]["32"]["loss"], losses[method], rtol=1e-4)
        if method in ("none", "dynamic", "log_n", "window"):  # these leave rows of the trained length as they were
            assert by_method[method]["8"]["loss"] == pytest.approx(by_method["none"]["8"]["loss"], rel=1e-5)
    assert len({f"{loss:.5f}" for loss in losses.values()}) == len(methods)
    assert f"{by_method['none']['32']['loss']:.4f}" in extrapolation.table(result)


@pytest.mark.parametrize(
    ("config", "method", "message"),
    [
        (mamba, "yarn", "extrapolate=yarn: does not fit this model: model.pattern='mamba' has none of attention"),
        (transformer, "dt", "extrapolate=dt: does not fit .* has none of mamba, mamba2, mamba3"),
        (transformer, "none,yran", r"extrapolate='none,yran': must be one or more of none, linear"),
    ],
)
def test_methods_of_extrapolation_that_do_not_fit(config, method, message):
    config = config.get_config()
    config.evaluation.extrapolate = method
    with pytest.raises(UserError, match=message):
        validate(config)
        extrapolation.check(config)
