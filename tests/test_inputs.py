"""Inputs against NumPy; the parameters of inputs and heads in a model, what does not fit, and rows in pieces."""

import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.configs import mamba
from seqmodels.data import ArraySpec
from seqmodels.errors import UserError
from seqmodels.forecasting import feed_back
from seqmodels.heads.forecast import Forecast
from seqmodels.heads.regress import Regress
from seqmodels.inputs import INPUTS
from seqmodels.inputs.frames import SMALLEST as SMALLEST_VARIANCE
from seqmodels.inputs.frames import Frames
from seqmodels.inputs.patches import Patches
from seqmodels.model import LanguageModel, SequenceModel, build, build_for

B, T, D = 4, 6, 5
RNG = np.random.default_rng(0)


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
