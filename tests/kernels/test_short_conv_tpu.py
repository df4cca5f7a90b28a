"""The TPU kernels of the short convolution: their numbers in Pallas's interpreter, their compilation ahead of time."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from test_selective_scan import documents
from test_short_conv import assert_close

from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.short_conv import mosaic_tpu, short_conv

BATCH, LENGTH, CHANNELS = 2, 60, 130  # two chunks of two tiles, two blocks of channels, padding on both axes


@pytest.fixture
def interpreter(monkeypatch):
    """Kernels run in the interpreter, whose memory starts as NaN, in chunks of 32 tokens and blocks of 128 channels."""
    pltpu.reset_tpu_interpret_mode_state()
    monkeypatch.setattr(mosaic_tpu, "INTERPRET", pltpu.InterpretParams())
    monkeypatch.setattr(mosaic_tpu, "TOKENS", 32)
    monkeypatch.setattr(mosaic_tpu, "WIDTH", 128)
    monkeypatch.setattr(mosaic_tpu, "TILE", 16)


def inputs(taps=4, length=LENGTH, channels=CHANNELS, seed=0, dtype=np.float32):
    draw = np.random.default_rng(seed)
    args = dict(
        x=draw.normal(size=(BATCH, length, channels)),
        weight=draw.normal(size=(taps, channels)),
        bias=draw.normal(size=channels),
        initial_state=draw.normal(size=(BATCH, taps - 1, channels)),
    )
    return {name: jnp.asarray(value, dtype) for name, value in args.items()}


def packed(length=LENGTH, **layout):
    return documents(batch=BATCH, length=length, **layout)


@functools.partial(jax.jit, static_argnames=("activation", "implementation"))
def value_and_gradients(args, layout, activation="silu", implementation="mosaic_tpu"):
    """y, the final state, and the gradients of a random functional of both."""

    def outputs(args):
        return short_conv(**args, **layout, activation=activation, implementation=implementation)

    results, pull = jax.vjp(outputs, args)
    draw = np.random.default_rng(7)
    (gradients,) = pull(tuple(jnp.asarray(draw.normal(size=v.shape), v.dtype) for v in results))
    return results, gradients


def expected(args, layout, **static):
    """The same by the reference in float64, from the same numbers."""
    with jax.enable_x64(True):
        double = {name: np.asarray(v, np.float64) for name, v in args.items()}
        return value_and_gradients(double, layout, implementation="reference", **static)


def assert_equals_reference(args, layout, **static):
    assert_close(value_and_gradients(args, layout, **static), expected(args, layout, **static), 1e-6)


@pytest.mark.parametrize("taps", [2, 4, 8])
def test_equals_float64_reference(interpreter, taps):
    """Documents, padding within the rows, and a state."""
    assert_equals_reference(inputs(taps), packed())


def test_documents_end_anywhere(interpreter):
    """At every token in one row, so around the borders of chunks too; never in the other."""
    for first in (1, 9):  # the state is, and is not, of the first document
        ids = np.stack([np.arange(1, LENGTH + 1) // 2 + 1, np.ones(LENGTH)]).astype(np.int32)
        layout = packed() | dict(segment_ids=ids, initial_segment=np.full(BATCH, first, np.int32))
        assert_equals_reference(inputs(8), layout | dict(mask=np.ones(ids.shape, bool)))


@pytest.mark.parametrize("length, channels", [(1, 3), (65, 256)])
def test_lengths_and_channels(interpreter, monkeypatch, length, channels):
    """Without documents; a block may have several columns."""
    monkeypatch.setattr(mosaic_tpu, "WIDTH", 2048)
    assert_equals_reference(inputs(length=length, channels=channels), {})


def test_bare(interpreter):
    """No bias, no state, no activation; fewer tokens than taps."""
    args = inputs(8, length=3, channels=2)
    assert_equals_reference({name: args[name] for name in ("x", "weight")}, {}, activation=None)


def test_poisoned_padding_never_leaks(interpreter):
    args, layout = inputs(), packed()
    poisoned = args | dict(x=jnp.where(layout["mask"][..., None], args["x"], np.nan))
    got = value_and_gradients(poisoned, layout)
    assert_close(got, value_and_gradients(args, layout), 1e-7)
    assert not np.asarray(got[0][0])[~np.asarray(layout["mask"])].any()


def test_extreme_sums(interpreter):
    """SiLU and its slope of sums far from zero; terms of 1e3 are rounded by 1e-4, which the slope near 0 feels."""
    args = inputs()
    args["x"] = args["x"] * 1e3
    got = value_and_gradients(args, packed())
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(got))
    assert_close(got, expected(args, packed()), 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(interpreter, dtype):
    """One rounding of y and of dx, at the end; sums over tokens in float32."""
    args, layout = inputs(), packed(padded=False)
    half = args | dict(x=args["x"].astype(dtype))
    (y, state), gradients = value_and_gradients(half, layout)
    assert y.dtype == gradients["x"].dtype == dtype
    assert all(v.dtype == jnp.float32 for v in (state, *(gradients[name] for name in args if name != "x")))
    (want, want_state), want_gradients = expected(half, layout)  # dy is rounded alike, of the same draw
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=2**-8, atol=1e-5)
    assert_close(state, want_state, 1e-6)
    assert_close(gradients, want_gradients, 5e-3)


def test_state_carries_over(interpreter):
    args, layout = inputs(), packed(padded=False)
    conv = jax.jit(functools.partial(short_conv, activation="silu", implementation="mosaic_tpu"))
    whole = conv(**args, **layout)
    both, time, cut = args | layout, ("x", "segment_ids"), LENGTH // 2
    first, state = conv(**{name: v[:, :cut] if name in time else v for name, v in both.items()})
    tail = {name: v[:, cut:] if name in time else v for name, v in both.items()}
    second, state = conv(**tail | dict(initial_state=state, initial_segment=both["segment_ids"][:, cut - 1]))
    assert_close((jnp.concatenate([first, second], axis=1), state), whole, 1e-6)


def test_no_races(interpreter, monkeypatch):
    """Two cores share the work; no core reads or writes what the other may be writing."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    monkeypatch.setattr(mosaic_tpu, "INTERPRET", pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2))
    monkeypatch.setattr(mosaic_tpu, "TOKENS", 16)
    assert_equals_reference(inputs(length=20), {})
    assert not interpret_pallas_call.races.races_found


def test_vmap(interpreter):
    args = [inputs(length=1, channels=3, seed=seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *args)
    got = jax.vmap(lambda args: value_and_gradients(args, {}))(stacked)
    assert_close(got, jax.tree.map(lambda *v: np.stack(v), *(expected(a, {}) for a in args)), 1e-6)


def test_reasons():
    assert mosaic_tpu.supports(platform="tpu") is None
    assert "needs a TPU" in mosaic_tpu.supports(platform="cuda")
    assert "float64" in mosaic_tpu.supports(platform="tpu", dtype=np.dtype("float64"))
    assert "empty" in mosaic_tpu.supports(platform="tpu", length=0)
    if jax.default_backend() != "tpu":
        with pytest.raises(UnsupportedError, match="needs a TPU"):
            short_conv(**inputs(), implementation="mosaic_tpu")


# chip, shape of x, taps, dtype, documents
COMPILED = [
    ("v5e", (2, 2048, 1536), 4, "bfloat16", True),
    ("v5p", (1, 300, 200), 2, "float32", True),
    ("v6e", (3, 33, 2176), 8, "bfloat16", False),
    ("v6e", (1, 1, 3), 4, "float16", True),
]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("chip, shape, taps, dtype, documents", COMPILED)
def test_compiles_for_tpu(chip, shape, taps, dtype, documents):
    """Forward and gradient: the interpreter takes what the compiler refuses."""
    from benchmarks import tpu_aot

    batch, length, channels = shape
    array = functools.partial(jax.ShapeDtypeStruct, sharding=tpu_aot.sharding(chip))

    small = ((taps, channels), (channels,), (batch, taps - 1, channels))
    args = (array(shape, dtype), *(array(size, jnp.float32) for size in small))
    ids = array((batch, length), jnp.int32) if documents else None

    def gradients(args, ids, dy):
        def conv(args):
            x, weight, bias, state = args
            layout = dict(segment_ids=ids, initial_segment=None, mask=None)
            return mosaic_tpu.short_conv(x, weight, bias, activation="silu", initial_state=state, **layout)[0]

        y, pull = jax.vjp(conv, args)
        return y, pull(dy)

    compiled = jax.jit(gradients).lower(args, ids, args[0]).compile()
    text = compiled.as_text()
    assert "short_conv_forward" in text and "short_conv_backward" in text
