"""The GPU kernels of the short convolution: their numbers in Pallas's GPU interpreter, their compilation ahead of time.

The interpreter compiles each kernel anew for every shape, for seconds; so pieces of time are short here, and one shape
has several of them, overlapping, of several blocks of channels, and channels that are padded.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels import short_conv as op
from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.lanes import THREADS, processors
from seqmodels.kernels.short_conv import few, mosaic_gpu, short_conv, tuning
from seqmodels.kernels.tuning import UNROLLED
from tests.kernels.helpers import (
    assembled,
    assert_close,
    compiled,
    expected,
    needs_cuda_plugin,
    poisoned,
    stacked,
    value_and_gradients,
)
from tests.kernels.inputs import short_conv_inputs as inputs
from tests.kernels.short_layouts import LAYOUTS, LENGTH

SILU = dict(activation="silu")
LAYOUT = "packed and padded"


run = functools.partial(value_and_gradients, short_conv, implementation="mosaic_gpu", options=SILU)


@pytest.fixture
def interpreter(gpu_interpreter, monkeypatch):
    """Pieces of 4 tokens, 2 loaded together."""
    monkeypatch.setattr(tuning, "SHORTEST", 4)
    monkeypatch.setattr(tuning, "TOGETHER", 2)


@pytest.mark.parametrize(
    "taps, layout",
    [
        (4, LAYOUT),
        pytest.param(4, "plain", marks=pytest.mark.slow),
        pytest.param(2, "packed, the state goes on", marks=pytest.mark.slow),
        pytest.param(6, LAYOUT, marks=pytest.mark.slow),  # more taps than tokens of a piece
    ],
)
def test_equals_float64_reference(interpreter, taps, layout):
    args = inputs(taps)
    assert tuning.piece("backward", 3, LENGTH, 8) == 4
    assert_close(run(args, LAYOUTS[layout]), expected(short_conv, args, LAYOUTS[layout], SILU), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("length", [2, 8, 13])
def test_without_bias_and_state(interpreter, length):
    """Rows shorter than the taps, of whole pieces, of pieces that overlap by three tokens."""
    args = {name: value for name, value in inputs(length=length).items() if name in ("x", "weight")}
    assert_close(run(args, {}), expected(short_conv, args, {}, SILU), 1e-6)


def test_poisoned_padding_never_leaks(interpreter):
    args, layout = inputs(), LAYOUTS[LAYOUT]
    hidden = poisoned(args, layout["mask"], ("x",))
    assert_close(run(hidden, layout), expected(short_conv, args, layout, SILU), 1e-6)
    y, _ = compiled(short_conv, "mosaic_gpu")(**hidden, **layout)
    assert not y[~layout["mask"]].any()


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_low_precision(interpreter, dtype):
    """Against the reference at the same rounded inputs: y and dx are rounded once, sums over tokens are float32."""
    half = {k: jnp.asarray(v, dtype if k == "x" else jnp.float32) for k, v in inputs().items()}
    (y, state), gradients = run(half, {})
    (want, want_state), want_gradients = expected(short_conv, half, {}, SILU)
    assert y.dtype == gradients["x"].dtype == dtype and state.dtype == jnp.float32
    rounding = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=rounding, atol=1e-6)
    np.testing.assert_array_equal(state, want_state)
    dx, want_dx = gradients.pop("x"), want_gradients.pop("x")
    assert_close(dx, want_dx, 2 * rounding)  # one more, where the final state's is added
    assert_close(gradients, want_gradients, 2 * rounding)  # the functional's weights are rounded like y


@pytest.mark.parametrize("taps, length", [(4, 1), (4, 5), (2, 2), (8, 3)])
def test_few_tokens(interpreter, taps, length):
    """As in decoding, by the kernel that updates the state in place; fewer tokens than taps and more."""
    args = inputs(taps, length=length, batch=2, width=256)
    assert few.supports(2, length, 256, documents=False) is None
    assert_close(run(args, {}), expected(short_conv, args, {}, SILU), 1e-6)
    bare = {name: args[name] for name in ("x", "weight")}
    assert_close(run(bare, {}), expected(short_conv, bare, {}, SILU), 1e-6)


def test_few_tokens_in_place():
    """As lowered for a GPU: the state's operand is an output, and XLA may donate it to that."""
    args = {k: jnp.asarray(v) for k, v in inputs(length=1, batch=2, width=256).items()}
    state = args.pop("initial_state")

    def step(state, args):
        return mosaic_gpu.few_tokens("silu", **args, state=state)

    lowered = jax.jit(step, donate_argnums=0).trace(state, args).lower(lowering_platforms=("cuda",)).as_text()
    (alias,) = re.findall(r"output_operand_alias<(.*)>", lowered)
    assert f"operand_index = {len(args)}" in alias
    several = stacked([(state, args)] * 2)
    jax.jit(jax.vmap(step)).trace(*several).lower(lowering_platforms=("cuda",))


@pytest.mark.slow
def test_vmap(interpreter):
    args = [inputs(seed=seed) for seed in (0, 1)]
    want = stacked([expected(short_conv, a, LAYOUTS["plain"], SILU) for a in args])
    assert_close(jax.vmap(lambda a: run(a, LAYOUTS["plain"]))(stacked(args)), want, 1e-6)


def test_reasons():
    facts = dict(batch=1, length=32, channels=4, taps=4, dtype=np.dtype("float32"))
    assert "needs an NVIDIA GPU" in mosaic_gpu.supports(platform="cpu", **facts)
    assert "float64" in mosaic_gpu.supports(platform="cuda", **facts | dict(dtype=np.dtype("float64")))
    assert "2^31" in mosaic_gpu.supports(platform="cuda", **facts | dict(length=2**30))
    for length, name in ((1, "xla"), (UNROLLED, "xla"), (UNROLLED + 1, "mosaic_gpu")):
        assert op.choose("cuda", **facts | dict(length=length))[0] == name
    step = facts | dict(length=1, channels=512)
    assert op.choose("cuda", **step)[0] == "mosaic_gpu"
    assert "documents or padding" in op.choose("cuda", **step, documents=True)[1]
    assert mosaic_gpu.supports(platform="cuda", named=True, **facts | dict(length=1)) is None
    if jax.default_backend() != "gpu":
        with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU"):
            short_conv(**inputs(), implementation="mosaic_gpu")


@pytest.mark.parametrize("sizes", [(8, 2048, 1536), (1, 262144, 2048), (1, 9, 64), (3, 2047, 4), (1, 1, 4), (2, 18, 8)])
@pytest.mark.parametrize("kind", tuning.LONGEST)
def test_pieces_cover_the_row(kind, sizes):
    batch, length, channels = sizes
    piece = tuning.piece(kind, *sizes)
    assert 1 <= piece <= length and piece % min(tuning.TOGETHER, length) == 0
    if piece > tuning.SHORTEST:
        threads = batch * length * channels / (piece * tuning.CHANNELS)
        assert threads >= 2 * processors() * THREADS


@needs_cuda_plugin
@pytest.mark.parametrize(
    "shape, dtype, documents, most_spilled",
    [
        ("8x2048x1536x4", "bfloat16", 1, 0),
        pytest.param("1x1001x130x8", "float32", 1, 32, marks=pytest.mark.slow),  # 9 x 4 sums, 3 x 7 x 4 inputs
        pytest.param("2x300x64x2", "float16", 0, 0, marks=pytest.mark.slow),
    ],
)
def test_compiles_into_registers(shape, dtype, documents, most_spilled):
    """The interpreter takes what the compiler refuses."""
    _, spilled = assembled("short_conv", shape, dtype, documents)
    assert len(spilled) == 2 and max(spilled) <= most_spilled


@needs_cuda_plugin
@pytest.mark.parametrize("shape, dtype", [("1x1x1536x4", "bfloat16"), ("64x8x2048x8", "float32")])
def test_a_few_tokens_compile_in_place(shape, dtype):
    """The donated state is read and written by one kernel, and never copied."""
    _, spilled = assembled("short_conv", shape, dtype, 0)
    assert spilled == [0]
