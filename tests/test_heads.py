"""Heads against NumPy in float64, values and gradients; what does not count."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from seqmodels.heads.classify import Classify
from seqmodels.heads.forecast import Forecast, future
from seqmodels.heads.gaussian import SMALLEST, Gaussian, NextValue, RegressSteps
from seqmodels.heads.pair import Pair
from seqmodels.heads.rebuild import Rebuild
from seqmodels.heads.regress import Regress
from seqmodels.heads.window import Window
from seqmodels.layers import pooling

B, T, D = 4, 6, 5
RNG = np.random.default_rng(0)
MASK = np.arange(T) < np.array([[6], [4], [1], [5]])
HIDDEN = np.random.default_rng(1).normal(size=(B, T, D))


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
