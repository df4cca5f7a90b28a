"""Inputs and heads against NumPy in float64, values and gradients; what does not count; what does not fit."""

import itertools
import math
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from seqmodels.configs import mamba
from seqmodels.data import ArraySpec
from seqmodels.errors import UserError
from seqmodels.forecasting import feed_back
from seqmodels.heads.classify import Classify
from seqmodels.heads.forecast import Forecast, future
from seqmodels.heads.gaussian import SMALLEST, Gaussian, NextValue, RegressSteps
from seqmodels.heads.pair import Pair
from seqmodels.heads.rebuild import Rebuild
from seqmodels.heads.regress import Regress
from seqmodels.heads.window import Window
from seqmodels.inputs import INPUTS
from seqmodels.inputs.frames import SMALLEST as SMALLEST_VARIANCE
from seqmodels.inputs.frames import Frames
from seqmodels.inputs.patches import Patches
from seqmodels.layers import pooling
from seqmodels.model import LanguageModel, SequenceModel, build, build_for

B, T, D = 4, 6, 5
RNG = np.random.default_rng(0)
MASK = np.arange(T) < np.array([[6], [4], [1], [5]])
HIDDEN = RNG.normal(size=(B, T, D))


def soft(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def pooled(p, pool):
    """Oracle: one row after the other, real positions only."""
    rows = [hidden[real] for hidden, real in zip(p["hidden"], MASK, strict=True)]
    if pool == "mean":
        vectors = [row.mean(axis=0) for row in rows]
    elif pool == "last":
        vectors = [row[-1] for row in rows]
    elif pool == "max":
        vectors = [row.max(axis=0) for row in rows]
    else:
        vectors = [soft(row @ p["pool_query"] / np.sqrt(D)) @ row for row in rows]
    return np.stack(vectors) @ p["kernel"] + p["bias"]


def classify_total(p, batch, pool):
    log_p = np.log(soft(pooled(p, pool)))
    return sum(-log_p[b, label] for b, label in enumerate(batch["labels"]) if label >= 0)


def regress_total(p, batch, pool):
    return np.nansum((pooled(p, pool) - batch["targets"]) ** 2)


def forecast_total(p, batch, horizon):
    predicted = (p["hidden"] @ p["kernel"] + p["bias"]).reshape(B, T, horizon, -1)
    total = 0.0
    for b in range(B):
        for t in range(T):
            for k in range(1, horizon + 1):
                if t + k < T and MASK[b, t] and MASK[b, t + k]:
                    total += ((predicted[b, t, k - 1] - batch["values"][b, t + k]) ** 2).sum()
    return total


def slopes(total, p):
    """Central differences of a function of a dict of arrays."""
    result = {}
    for name, array in p.items():
        result[name] = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            moved = [{**p, name: array.copy()} for _ in range(2)]
            moved[0][name][place] += 1e-5
            moved[1][name][place] -= 1e-5
            result[name][place] = (total(moved[0]) - total(moved[1])) / 2e-5
    return result


def compare(head, batch, total, p):
    """Value and gradients of a head's loss, where hidden states of padding are NaN, against an oracle."""

    def loss(p):
        hidden = jnp.where(MASK[..., None], p["hidden"], jnp.nan)
        variables = {"params": {name: x for name, x in p.items() if name != "hidden"}}
        outputs_of = lambda hidden, mask, *more: head.apply(variables, hidden, mask, None, *more)  # noqa: E731
        return head.loss(outputs_of, hidden, {"mask": MASK, **batch})

    small = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), p)
    (value, sums), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(small)
    assert float(value) == pytest.approx(total(p), rel=1e-5)
    expected = slopes(total, p)
    expected["hidden"] = np.where(MASK[..., None], expected["hidden"], 0)
    for name, slope in expected.items():
        np.testing.assert_allclose(gradients[name], slope, rtol=1e-4, atol=2e-5, err_msg=name)
    return sums


def parameters(outputs):
    p = dict(hidden=HIDDEN, kernel=RNG.normal(size=(D, outputs)), bias=RNG.normal(size=outputs))
    return p | {"pool_query": RNG.normal(size=D)}


@pytest.mark.parametrize("pool", pooling.POOLS)
def test_classify(pool):
    """One row has no label."""
    p, batch = parameters(3), {"labels": np.array([2, -1, 0, 1])}
    if pool != "attention":
        del p["pool_query"]
    sums = compare(Classify(D, 3, pool=pool), batch, lambda p: classify_total(p, batch, pool), p)
    right = (pooled(p, pool).argmax(-1) == batch["labels"]).sum()
    figures = Classify.figures(sums)
    assert list(figures) == ["loss", "accuracy"] and float(sums.count) == 3
    assert float(figures["loss"]) == pytest.approx(classify_total(p, batch, pool) / 3, rel=1e-5)
    assert float(figures["accuracy"]) == pytest.approx(right / 3)


@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_regress(pool):
    """Targets that are not known are NaN."""
    p, targets = parameters(2), RNG.normal(size=(B, 2))
    if pool != "attention":
        del p["pool_query"]
    targets[0, 1] = targets[3] = np.nan
    batch = {"targets": targets}
    sums = compare(Regress(D, 2, pool=pool), batch, lambda p: regress_total(p, batch, pool), p)
    assert float(sums.count) == 5
    assert float(Regress.figures(sums)["loss"]) == pytest.approx(regress_total(p, batch, pool) / 5, rel=1e-5)


def documents_of(pool, p, ids, count):
    """Oracle: the vectors [B, count, D] of each row's documents, which change where ids do; zeros where none is."""
    vectors = np.zeros((B, count, D))
    for b, (hidden, real) in enumerate(zip(p["hidden"], MASK, strict=True)):
        rows, own = hidden[real], ids[b][real]
        number = np.cumsum(np.append(0, own[1:] != own[:-1]))
        for n in range(min(count, number[-1] + 1)):
            row = rows[number == n]
            vectors[b, n] = {"mean": row.mean(axis=0), "last": row[-1], "max": row.max(axis=0)}[pool]
    return vectors


IDS = np.array([[4, 4, 1, 1, 4, 4], [0, 0, 0, 2, 0, 0], [7, 0, 0, 0, 0, 0], [1, 2, 2, 3, 3, 9]])


@pytest.mark.parametrize("pool", ["mean", "last", "max"])
def test_classes_of_documents(pool):
    """Three a row at most; what is not there has no label."""
    p = parameters(3)
    del p["pool_query"]
    batch = {"labels": np.array([[2, 0, 1], [0, 1, -1], [1, -1, -1], [-1, 2, 2]]), "segment_ids": IDS}

    def total(p):
        log_p = np.log(soft(documents_of(pool, p, IDS, 3) @ p["kernel"] + p["bias"]))
        return sum(-log_p[b, s, y] for (b, s), y in np.ndenumerate(batch["labels"]) if y >= 0)

    assert float(compare(Classify(D, 3, pool=pool), batch, total, p).count) == 8


def test_pair():
    """[a, b, a - b, a b] of a row's first two documents, through a layer with GELU."""
    p, batch = parameters(2), {"labels": np.array([1, 0, -1, 1]), "segment_ids": IDS}
    del p["pool_query"]
    p |= {"mix": RNG.normal(size=(4 * D, D)), "mix_bias": RNG.normal(size=D)}
    erf = np.vectorize(math.erf)

    def total(p):
        a, b = np.moveaxis(documents_of("mean", p, IDS, 2), 1, 0)
        x = np.concatenate([a, b, a - b, a * b], axis=-1) @ p["mix"] + p["mix_bias"]
        log_p = np.log(soft(x / 2 * (1 + erf(x / np.sqrt(2))) @ p["kernel"] + p["bias"]))
        return sum(-log_p[b, y] for b, y in enumerate(batch["labels"]) if y >= 0)

    assert float(compare(Pair(D, 2), batch, total, p).count) == 3


def test_window():
    """Targets that are not known are NaN; the mean absolute error is reported too."""
    p, targets = parameters(3 * 2), RNG.normal(size=(B, 3, 2))
    del p["pool_query"]
    targets[1, 2] = np.nan
    batch = {"targets": targets, "values": np.zeros((B, T, 2))}
    predicted = lambda p: pooled(p, "last").reshape(B, 3, 2)  # noqa: E731

    class Alone(Window):  # without an input that would scale the predictions back
        def __call__(self, hidden, mask, table, segment_ids, documents, values):
            return super().__call__(hidden, mask)

    head = Alone(D, 2, pool="last", horizon=3)
    sums = compare(head, batch, lambda p: np.nansum((predicted(p) - targets) ** 2), p)
    assert float(sums.count) == 22
    assert float(Window.figures(sums)["mae"]) == pytest.approx(np.nanmean(np.abs(predicted(p) - targets)), rel=1e-5)


@pytest.mark.parametrize("pool", pooling.POOLS)
def test_a_pool_in_pieces_is_the_pool_of_the_whole(pool):
    """Cut anywhere, with padding and documents: of the document that is open at the end, value and gradient."""
    query = jnp.asarray(RNG.normal(size=D), jnp.float32)
    length = 9
    hidden = jnp.asarray(RNG.normal(size=(B, length, D)), jnp.float32)
    mask = jnp.asarray(RNG.random((B, length)) < 0.7).at[:, [0, 8]].set(True)
    ids = jnp.asarray(np.cumsum(RNG.random((B, length)) < 0.2, axis=1) % 2)

    def newest(hidden):
        """Of each row, the positions from the start of its last document on."""
        number = pooling.document_numbers(ids, mask)
        return pooling.whole(pool, hidden, mask & (number == number[:, -1:]), query)

    def in_pieces(hidden, cuts):
        state, before = pooling.start(pool, B, D), None
        for a, b in itertools.pairwise([0, *cuts, length]):
            piece = slice(a, b)
            state = pooling.carry_on(pool, state, hidden[:, piece], mask[:, piece], ids[:, piece], before, query)
            last = jnp.max(jnp.where(mask[:, :b], jnp.arange(b), 0), axis=1)
            before = jnp.take_along_axis(ids, last[:, None], axis=1)[:, 0]
        return pooling.finish(pool, state)

    weights = RNG.normal(size=(B, D))

    @jax.jit
    def both(hidden):
        one = jax.value_and_grad(lambda h: (newest(h) * weights).sum())(hidden)
        return one, jax.value_and_grad(lambda h: (in_pieces(h, [1, 3, 7]) * weights).sum())(hidden)

    (expected, slope), (found, slopes) = both(hidden)
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    np.testing.assert_allclose(slopes, slope, rtol=1e-4, atol=1e-6)


def gaussian(p):
    """Oracle: means and variances [B, T, R]."""
    y = (p["hidden"] @ p["kernel"] + p["bias"]).reshape(B, T, 2, -1)
    raw = y[:, :, 1]
    return y[:, :, 0], np.where(raw < 0, np.exp(np.minimum(raw, 0)), raw + 1) + SMALLEST


def test_next_value():
    """Scipy's normal density of the next values; those of padding and those that are not observed are NaN."""
    p, values, observed = parameters(2 * 2), RNG.normal(size=(B, T, 2)), RNG.random((B, T, 2)) < 0.7
    del p["pool_query"]
    values[~MASK], values[~observed] = np.nan, np.nan
    counts = (MASK[:, :-1] & MASK[:, 1:])[..., None] & observed[:, 1:]

    def total(p):
        mean, variance = (x[:, :-1][counts] for x in gaussian(p))
        return -norm.logpdf(values[:, 1:][counts], mean, np.sqrt(variance)).sum()

    sums = compare(NextValue(D, 2), {"values": values, "observed": observed}, total, p)
    figures, error = NextValue.figures(sums), (gaussian(p)[0][:, :-1] - values[:, 1:])[counts]
    assert list(figures) == ["loss", "mse"] and float(sums.count) == counts.sum()
    assert float(figures["mse"]) == pytest.approx((error**2).mean(), rel=1e-5)


def test_regress_steps():
    """The same of targets at every position; NaN does not count. Scaled back, it is SciPy's density with a scale."""
    p, targets = parameters(2 * 2), RNG.normal(size=(B, T, 2))
    del p["pool_query"]
    targets[1, 2], targets[~MASK] = np.nan, np.nan
    counts = ~np.isnan(targets)

    def total(p):
        mean, variance = (x[counts] for x in gaussian(p))
        return -norm.logpdf(targets[counts], mean, np.sqrt(variance)).sum()

    sums = compare(RegressSteps(D, 2), {"targets": targets}, total, p)
    assert float(sums.count) == counts.sum()
    mean, variance = gaussian(p)
    units = np.array([[[3.0, 0.5]]]), np.array([[[2.0, 4.0]]])
    restored = RegressSteps(D, 2).restore(jnp.stack([mean, variance], axis=2), *units)
    found, _ = Gaussian.likelihood(restored, jnp.where(counts, targets, 0), counts)
    scale = np.sqrt(variance) * units[1]
    expected = -norm.logpdf(targets, mean * units[1] + units[0], scale)[counts].sum()
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("horizon", [1, 3, 8])
def test_forecast(horizon):
    """Up to beyond the end of the row; values of padding are NaN."""
    p, values = parameters(2 * horizon), RNG.normal(size=(B, T, 2))
    del p["pool_query"]
    values[~MASK] = np.nan
    batch, total = {"values": values}, lambda p: forecast_total(p, {"values": values}, horizon)
    sums = compare(Forecast(D, 2, horizon=horizon), batch, total, p)
    count = sum(max(n - k, 0) for n in (6, 4, 1, 5) for k in range(1, horizon + 1)) * 2
    figures = Forecast.figures(sums)
    assert list(figures) == ["loss", "mae"] and float(sums.count) == count
    assert float(figures["loss"]) == pytest.approx(total(p) / count, rel=1e-5)
    predicted = (HIDDEN @ p["kernel"] + p["bias"]).reshape(B, T, horizon, 2)
    targets, counts = future(values, MASK, horizon)
    absolute = np.abs(predicted - targets)[np.asarray(counts)].sum()
    assert float(figures["mae"]) == pytest.approx(absolute / count, rel=1e-5)


def test_the_next_document_is_no_future():
    ids = np.array([[0, 0, 0, 1, 1, 1]])
    _, counts = future(np.zeros((1, 6, 1)), np.ones((1, 6), bool), 2, ids)
    np.testing.assert_array_equal(counts[0], [[1, 1], [1, 0], [0, 0], [1, 1], [1, 0], [0, 0]])


@pytest.mark.parametrize(
    "head", [Classify(D, 3, pool="mean"), Classify(D, 3, pool="last"), Regress(D, 3, pool="attention")]
)
def test_a_row_of_padding_alone_is_finite(head):
    mask, hidden = np.zeros((2, T), bool), np.full((2, T, D), np.nan)
    variables = jax.jit(head.init)(jax.random.key(0), hidden, mask)
    plain = jax.tree.map(lambda x: x.value, variables, is_leaf=lambda x: hasattr(x, "names"))

    @jax.jit
    def both(hidden, variables):
        outputs, pullback = jax.vjp(lambda h, v: head.apply(v, h, mask), hidden, variables)
        return outputs, pullback(jnp.ones_like(outputs))

    found = both(jnp.asarray(hidden, jnp.float32), plain)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


def test_inputs():
    """Looked up, multiplied, and nothing for an id outside the alphabet or a frame of padding."""
    key, ids = jax.random.key(0), np.array([[0, 3, 2], [1, -1, 4]])
    values = RNG.normal(size=(2, 3, 2)).astype(np.float32)
    mask = np.array([[True, True, False], [True, True, True]])
    values[0, 2] = np.nan

    def call(name, size, x, mask=None):
        layer = INPUTS[name](width=D, size=size)
        variables = layer.init(key, x, mask)
        params = jax.tree.map(lambda p: p.value, variables, is_leaf=lambda p: hasattr(p, "names"))["params"]
        return layer.apply({"params": params}, x, mask), {name: np.asarray(p, np.float64) for name, p in params.items()}

    x, params = call("tokens", 5, np.maximum(ids, 0))
    np.testing.assert_array_equal(x, params["embedding"][np.maximum(ids, 0)].astype(np.float32))
    outside, _ = call("tokens", 5, np.where(mask, np.maximum(ids, 0), 10**6), mask)
    np.testing.assert_array_equal(outside[mask], x[mask])
    assert np.isfinite(outside).all()
    x, params = call("one_hot", 4, ids)
    expected = np.where(((ids >= 0) & (ids < 4))[..., None], params["kernel"][ids % 4], 0)
    np.testing.assert_allclose(x, expected, rtol=1e-6)
    x, params = call("frames", 2, values, mask)
    expected = np.where(mask[..., None], values, 0) @ params["kernel"] + params["bias"]
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)


def test_patches_and_window_norm():
    """Two frames side by side, those of padding as zeros; mean and deviation of real values go and come back."""
    values = RNG.normal(2, 3, size=(2, 4, 2)).astype(np.float32)
    mask = np.array([[True, True, True, False], [True] * 4])
    values[0, 3] = np.nan
    layer = Patches(width=D, size=2, patch=2)
    variables = jax.tree.map(lambda p: p.value, layer.init(jax.random.key(0), values, mask),
                             is_leaf=lambda p: hasattr(p, "names"))  # fmt: skip
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    expected = np.where(mask[..., None], values, 0).reshape(2, 2, 4) @ kernel
    np.testing.assert_allclose(layer.apply(variables, values, mask), expected, rtol=1e-5, atol=1e-5)
    short, ids = layer.shortened(jnp.asarray([[True, False, False, False]]), jnp.asarray([[0, 0, 1, 1]]))
    assert short.tolist() == [[True, False]] and ids.tolist() == [[0, 1]]
    with pytest.raises(ValueError, match=r"3 frames are no multiple of config.model.patch=2"):
        layer.apply(variables, values[:, :3])

    layer = Frames(width=D, size=2, window_norm=True)
    found = layer.apply({"params": {"kernel": np.eye(2, D), "bias": np.zeros(D)}}, values, mask)[..., :2]
    back = Regress(D, 2).restore(found, *layer.scale(values, mask))
    for row, real, result, old in zip(values, mask, found, back, strict=True):
        mean, deviation = row[real].mean(axis=0), row[real].std(axis=0)
        np.testing.assert_allclose(result[real], (row[real] - mean) / deviation, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(old[real], row[real], rtol=1e-4, atol=1e-4)

    observed = np.array([[[1, 1], [0, 1], [1, 0], [1, 1]], [[1, 0], [1, 0], [0, 0], [1, 0]]], bool)
    there = observed & mask[..., None]
    values[~there] = np.nan
    layer = Patches(width=8, size=2, patch=2, window_norm=True, observed=True)
    found = layer.apply({"params": {"kernel": np.eye(8), "bias": np.zeros(8)}}, values, mask, observed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a channel without a value
        mean, deviation = np.nanmean(values, axis=1, keepdims=True), np.nanstd(values, axis=1, keepdims=True)
    normed = np.where(there, (values - mean) / np.sqrt(deviation**2 + SMALLEST_VARIANCE), 0)
    expected = np.concatenate([normed, there], axis=-1).reshape(2, 2, 8)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def settings(**fields):
    config = mamba.get_config().model.unlock()
    config.width, config.repeats = 8, 1
    config.update(fields)
    return config


def dataset(objective, **arrays):
    spec = {name: ArraySpec((B, *shape), np.dtype(dtype), count) for name, (shape, dtype, count) in arrays.items()}
    return types.SimpleNamespace(objective=objective, spec=spec)


TOKENS = ((T,), "int32", 11)
ROW = dict(mask=((T,), bool, 0), labels=((), "int32", 3))
SERIES = dict(values=((T, 2), "float32", 0), mask=((T,), bool, 0))


def names(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), model.example_input(T))["params"]
    return {jax.tree_util.keystr(path[:2], simple=True, separator="/"): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(shapes) if "block" not in str(path[0])
            and "norm" not in str(path[0])}  # fmt: skip


def test_parameters_of_inputs_and_heads():
    """Those of a language model stay at the root of the tree, the others have their part's name."""
    language = build(settings(tie_embeddings=False), 11)
    assert type(language) is LanguageModel
    assert {name.split("/")[0]: shape for name, shape in names(language).items()} == {
        "embedding": (16, 8), "head": (8, 16),
    }  # fmt: skip
    model = build_for(settings(head="classify", pool="attention"), dataset("classify", tokens=TOKENS, **ROW))
    assert type(model) is SequenceModel
    assert {name.removesuffix("/value"): shape for name, shape in names(model).items()} == {
        "embedding": (16, 8), "classify/kernel": (8, 3), "classify/bias": (3,), "classify/pool_query": (8,),
    }  # fmt: skip
    model = build_for(settings(input="frames", head="forecast", horizon=4), dataset("forecast", **SERIES))
    assert names(model) == {
        "frames/kernel": (2, 8), "frames/bias": (8,), "forecast/kernel": (8, 8), "forecast/bias": (8,),
    }  # fmt: skip
    text = dict(tokens=TOKENS, targets=TOKENS)
    model = build_for(settings(input="one_hot", tie_embeddings=False), dataset("next_token", **text))
    assert {name.removesuffix("/value"): shape for name, shape in names(model).items()} == {
        "one_hot/kernel": (11, 8), "head": (8, 16),
    }  # fmt: skip


@pytest.mark.parametrize(
    "fields, data, words",
    [
        (dict(head="clasify"), dataset("classify", tokens=TOKENS, **ROW),
         "config.model.head='clasify': must be one of 'next_token', 'classify', 'regress', 'forecast'"),
        (dict(input="token"), dataset("next_token", tokens=TOKENS),
         "config.model.input='token': must be one of 'tokens', 'frames', 'one_hot'"),
        (dict(), dataset("classify", tokens=TOKENS, **ROW),
         "config.model.head='next_token': must be 'classify', which is what the dataset is for"),
        (dict(head="classify"), dataset("classify", **SERIES),
         "config.model.input='tokens': must be 'frames' or 'patches'; it needs 'tokens' in .* which have values, mask"),
        (dict(head="classify"), dataset("classify", tokens=TOKENS, labels=ROW["labels"]),
         "config.model.head='classify': needs 'mask' in .* which have tokens, labels"),
        (dict(head="classify"), dataset("classify", tokens=TOKENS, mask=ROW["mask"], labels=((), "int32", 0)),
         "dataset.spec\\['labels'\\].count=0: must be the number of different ids"),
        (dict(head="classify", pool="median"), dataset("classify", tokens=TOKENS, **ROW),
         "config.model.pool='median': must be one of 'mean', 'last', 'attention', 'max'"),
        (dict(input="frames", head="forecast", horizon=0), dataset("forecast", **SERIES),
         "config.model.horizon=0: must be at least 1"),
        (dict(input="patches", patch=4, head="classify"), dataset("classify", **SERIES, labels=ROW["labels"]),
         "config.model.patch=4: must be a divisor of the 6 steps of a row"),
        (dict(input="patches", head="forecast"), dataset("forecast", **SERIES),
         "config.model.input='patches': must be another with model.head='forecast'"),
        (dict(input="frames", head="window"), dataset("window", **SERIES, targets=((3, 2), "float32", 0)),
         "config.model.horizon=1: must be 3, as the dataset's targets have so many steps"),
        (dict(input="frames", head="classify", window_norm=True), dataset("classify", **SERIES, labels=ROW["labels"]),
         "config.model.window_norm=True: must be False with model.head='classify'"),
        (dict(input="frames", head="classify"),
         dataset("classify", **SERIES, labels=ROW["labels"], observed=((T, 2), "bool", 0)),
         "config.model.observed=False: must be True with the dataset's batches, which say what is missing"),
        (dict(input="frames", head="classify", observed=True), dataset("classify", **SERIES, labels=ROW["labels"]),
         "config.model.observed=True: must be False with the dataset's batches, which do not say what is missing"),
        (dict(head="pair"), dataset("pair", tokens=TOKENS, **ROW),
         "config.model.head='pair': needs 'segment_ids' in"),
        (dict(input="one_hot"), dataset("next_token", tokens=TOKENS, targets=TOKENS),
         "config.model.tie_embeddings=True: must be False with config.model.input='one_hot'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(fields, data, words):
    with pytest.raises(UserError, match=words) as raised:
        build_for(settings(**fields), data)
    assert "\n" not in str(raised.value)


def test_a_head_that_must_not_see_the_future():
    """A stack that reads later positions cannot predict them, but may classify."""
    words = (
        "config.model.head='next_token': must be 'classify' or 'regress' or 'window' or 'pair' or 'rebuild' or "
        "'regress_steps' with "
        "model.pattern='bi"
    )
    with pytest.raises(UserError, match=words):
        build(settings(pattern="bi:mamba"), 11)
    data = dataset("classify", tokens=TOKENS, **ROW)
    model = build_for(settings(pattern="bi:mamba", head="classify"), data)
    assert (
        "ahead" in jax.eval_shape(model.init, jax.random.key(0), model.example_input(T))["params"]["block_0"]["mixer"]
    )
    with pytest.raises(UserError, match=r"config.model.mamba.state=0: must be "):
        config = settings(pattern="bi:mamba", head="classify")
        config.mamba.state = 0
        build_for(config, data)


def test_a_recording_is_classified_in_pieces():
    """With padding in between: the logits of the whole; and each document of a row has its own."""
    data = dataset("classify", **SERIES, labels=ROW["labels"])
    model = build_for(settings(pattern="gru", input="frames", head="classify", pool="attention"), data)
    values, length = RNG.normal(size=(2, 12, 2)).astype(np.float32), 12
    mask = jnp.asarray(RNG.random((2, length)) < 0.8).at[:, -1].set(True)
    ids = jnp.asarray(np.repeat([[3] * 6 + [8] * 6], 2, axis=0))
    variables = jax.tree.map(lambda p: p.value, jax.jit(model.init)(jax.random.key(0), values),
                             is_leaf=lambda p: hasattr(p, "names"))  # fmt: skip
    variables = jax.tree.map(lambda p: p + 0.3 * np.random.default_rng(p.size).normal(size=p.shape), variables)

    @jax.jit
    def read(values, ids, mask, state):
        hidden, state = model.apply(variables, values, ids, mask, state)
        return hidden, state, model.apply(variables, state, method="read_out")

    hidden, _, last = read(values, 0 * ids, mask, model.init_state(2))
    whole = model.apply(variables, hidden, mask, method="outputs")
    np.testing.assert_allclose(last, whole, rtol=1e-5)
    state = model.init_state(2)
    for start in range(0, length, 4):
        piece = slice(start, start + 4)
        _, state, last = read(values[:, piece], 0 * ids[:, piece], mask[:, piece], state)
    np.testing.assert_allclose(last, whole, rtol=2e-4, atol=1e-5)
    hidden, _, last = read(values, ids, mask, model.init_state(2))
    both = model.apply(variables, hidden, mask, ids, 2, method="outputs")
    np.testing.assert_allclose(last, both[:, 1], rtol=2e-4, atol=1e-5)
    for n, part in enumerate((slice(0, 6), slice(6, length))):
        alone = read(values[:, part], 0 * ids[:, part], mask[:, part], model.init_state(2))[2]
        np.testing.assert_allclose(both[:, n], alone, rtol=2e-4, atol=1e-5)


def test_two_texts_of_a_row_are_read_apart_in_both_directions():
    """What the second text says changes nothing in the first; a window that is normalised has no state."""
    data = dataset("pair", tokens=TOKENS, segment_ids=((T,), "int32", 0), **ROW)
    model = build_for(settings(pattern="bi:gru", head="pair"), data)
    tokens, ids = RNG.integers(11, size=(2, T)), np.array([[0] * 3 + [1] * 3] * 2)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    read = jax.jit(lambda tokens, ids: model.apply(variables, tokens, ids)[0])
    hidden, other = read(tokens, ids), read((tokens + np.array([0, 0, 0, 1, 1, 1])) % 11, ids)
    np.testing.assert_array_equal(hidden[:, :3], other[:, :3])
    assert np.abs(hidden - other)[:, 3:].max() > 1e-4
    assert model.apply(variables, hidden, None, ids, 2, method="outputs").shape == (2, 3)
    series = dataset("window", **SERIES, targets=((3, 2), "float32", 0))
    model = build_for(settings(input="frames", head="window", horizon=3, window_norm=True), series)
    assert not model.causal
    with pytest.raises(UserError, match=r"config.model.window_norm=True: reads whole rows"):
        model.init_state(1)


def test_predictions_are_fed_back_with_the_state():
    """Each step is the mean behind all before it, as a model says that reads them anew every time."""
    model = build_for(settings(pattern="gru", input="frames", head="next_value", observed=True),
                      dataset("next_value", **SERIES, observed=((T, 2), "bool", 0)))  # fmt: skip
    values, observed = RNG.normal(size=(2, T, 2)).astype(np.float32), RNG.random((2, T, 2)) < 0.8
    params = jax.tree.map(lambda p: p.value, jax.jit(model.init)(jax.random.key(0), values),
                          is_leaf=lambda p: hasattr(p, "names"))["params"]  # fmt: skip
    params = jax.tree.map(lambda p: p + 0.3 * np.random.default_rng(p.size).normal(size=p.shape), params)
    found = feed_back(model, params, np.where(observed, values, np.nan), 3, observed)
    assert found.shape == (2, 3, 2) and np.abs(np.diff(found, axis=1)).max() > 1e-3

    @jax.jit
    def read(values, observed, mask):
        hidden, _ = model.apply({"params": params}, values, mask=mask, observed=observed)
        return model.apply({"params": params}, hidden, mask, method="outputs")[:, :, 0]

    values, observed = (np.pad(x, ((0, 0), (0, 3), (0, 0)), constant_values=1) for x in (values, observed))
    for n in range(T, T + 3):  # what is behind position n is padding
        values[:, n] = read(values, observed, np.broadcast_to(np.arange(T + 3) < n, (2, T + 3)))[:, n - 1]
    np.testing.assert_allclose(found, values[:, T:], rtol=1e-4, atol=1e-5)
    outputs = np.arange(24).reshape(1, 3, 4, 2)  # [B, T, horizon, C]
    np.testing.assert_array_equal(Forecast.next_of(outputs), outputs[:, :, 0])


def test_rebuild():
    """Every token from the last real hidden state and its position, through two layers with GELU."""
    width, size, erf = 4, 3, np.vectorize(math.erf)
    p = dict(hidden=HIDDEN[..., :width])
    for name, out in (("decoder_0", width), ("decoder_1", width), ("kernel", size)):
        bias = "bias" if name == "kernel" else f"{name}_bias"
        p |= {name: RNG.normal(size=(width, out)), bias: RNG.normal(size=out), f"{name}_norm": RNG.normal(size=width)}
    batch = {"targets": RNG.integers(-1, size, (B, T))}

    def total(p):
        last = np.stack([hidden[real][-1] for hidden, real in zip(p["hidden"], MASK, strict=True)])
        angles = np.arange(T)[:, None] * np.array([1.0, 0.01])
        x = last[:, None] + np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        for name in ("decoder_0", "decoder_1", "kernel"):
            normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p[f"{name}_norm"]
            x = normed @ p[name] + p["bias" if name == "kernel" else f"{name}_bias"]
            x = x if name == "kernel" else x / 2 * (1 + erf(x / np.sqrt(2)))
        log_p = np.log(soft(x))
        return sum(-log_p[b, t, y] for (b, t), y in np.ndenumerate(batch["targets"]) if y >= 0)

    assert float(compare(Rebuild(width, size), batch, total, p).count) == (batch["targets"] >= 0).sum()
