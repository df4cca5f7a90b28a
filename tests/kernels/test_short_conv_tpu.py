"""The TPU kernels of the short convolution: their numbers in Pallas's interpreter, their compilation ahead of time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.interpreter import interpret
from seqmodels.kernels.short_conv import mosaic_tpu, short_conv
from tests.kernels.helpers import (
    assert_close,
    assert_finite,
    compiled,
    documents,
    expected,
    in_two_calls,
    needs_libtpu,
    poisoned,
    stacked,
    value_and_gradients,
)
from tests.kernels.inputs import short_conv_inputs

BATCH, LENGTH, CHANNELS = 2, 60, 130  # two chunks of two tiles, two blocks of channels, padding on both axes


SILU = dict(activation="silu")
inputs = functools.partial(short_conv_inputs, length=LENGTH, batch=BATCH, width=CHANNELS)
packed = functools.partial(documents, batch=BATCH, length=LENGTH)
run = functools.partial(value_and_gradients, short_conv, implementation="mosaic_tpu")


@pytest.fixture
def interpreter(tpu_interpreter, monkeypatch):
    """Chunks of 32 tokens, tiles of 16, and blocks of 128 channels."""
    monkeypatch.setattr(mosaic_tpu, "TOKENS", 32)
    monkeypatch.setattr(mosaic_tpu, "WIDTH", 128)
    monkeypatch.setattr(mosaic_tpu, "TILE", 16)


def assert_equals_reference(args, layout, activation="silu", patched=""):
    options = dict(activation=activation)
    got = run(args, layout, options=options, patched=patched)
    assert_close(got, expected(short_conv, args, layout, options), 1e-6)


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
    assert_equals_reference(inputs(length=length, width=channels), {}, patched="wide blocks")


def test_bare(interpreter):
    """No bias, no state, no activation; fewer tokens than taps."""
    args = inputs(8, length=3, width=2)
    assert_equals_reference({name: args[name] for name in ("x", "weight")}, {}, activation=None)


def test_poisoned_padding_never_leaks(interpreter):
    args, layout = inputs(), packed()
    hidden = poisoned(args, layout["mask"], ("x",))
    assert_close(run(hidden, layout, options=SILU), run(args, layout, options=SILU), 1e-7)
    y, _ = compiled(short_conv, "mosaic_tpu", **SILU)(**hidden, **layout)
    assert not y[~layout["mask"]].any()


def test_extreme_sums(interpreter):
    """SiLU and its slope of sums far from zero; terms of 1e3 are rounded by 1e-4, which the slope near 0 feels."""
    args = inputs()
    args["x"] = args["x"] * 1e3
    got = run(args, packed(), options=SILU)
    assert_finite(got)
    assert_close(got, expected(short_conv, args, packed(), SILU), 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(interpreter, dtype):
    """One rounding of y and of dx, at the end; sums over tokens in float32."""
    args, layout = inputs(), packed(padded=False)
    half = args | dict(x=jnp.asarray(args["x"], dtype))
    (y, state), gradients = run(half, layout, options=SILU)
    assert y.dtype == gradients["x"].dtype == dtype
    assert all(v.dtype == jnp.float32 for v in (state, *(gradients[name] for name in args if name != "x")))
    (want, want_state), want_gradients = expected(
        short_conv, half, layout, SILU
    )  # dy is rounded alike, of the same draw
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=2**-8, atol=1e-5)
    assert_close(state, want_state, 1e-6)
    assert_close(gradients, want_gradients, 5e-3)


def test_state_carries_over(interpreter):
    args, layout = inputs(), packed(padded=False)
    conv = compiled(short_conv, "mosaic_tpu", **SILU)
    assert_close(in_two_calls(conv, args, layout, LENGTH // 2, ("x",)), conv(**args, **layout), 1e-6)


def test_no_races(interpreter, monkeypatch):
    """Two cores share the work; no core reads or writes what the other may be writing."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    monkeypatch.setattr(mosaic_tpu, "TOKENS", 16)
    with interpret(detect_races=True, num_cores_or_threads=2):
        assert_equals_reference(inputs(length=20), {})
    assert not interpret_pallas_call.races.races_found


def test_vmap(interpreter):
    args = [inputs(length=1, width=3, seed=seed) for seed in (0, 1)]
    want = stacked([expected(short_conv, a, {}, SILU) for a in args])
    assert_close(jax.vmap(lambda a: run(a, {}, options=SILU))(stacked(args)), want, 1e-6)


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


@needs_libtpu
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
