"""The GPU kernels of the short convolution: their numbers in Pallas's GPU interpreter, their compilation ahead of time.

The interpreter compiles each kernel anew for every shape, for seconds; so pieces of time are short here, and one shape
has several of them, overlapping, of several blocks of channels, and channels that are padded.
"""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_short_conv import LAYOUTS, LENGTH, assert_close, inputs, value_and_gradients

from seqmodels.kernels import lanes
from seqmodels.kernels import short_conv as op
from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.short_conv import few, mosaic_gpu, short_conv, tuning

HERE = Path(__file__).resolve().parent
LAYOUT = "packed and padded"


@pytest.fixture(scope="module")
def interpreter():
    """Kernels run in the interpreter, whose memory starts as NaN, on pieces of 4 tokens, 2 loaded together."""
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("the interpreter of jax 0.10 compiles at every launch, a minute for each gradient")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "INTERPRET", plgpu.InterpretGPUParams())
        patch.setattr(tuning, "SHORTEST", 4)
        patch.setattr(tuning, "TOGETHER", 2)
        jax.clear_caches()  # the kernels are jitted, and know nothing of these
        yield patch
    jax.clear_caches()


def expected(args, layout):
    """By the reference in float64, from the same numbers."""
    with jax.enable_x64(True):
        return value_and_gradients({k: np.asarray(v, np.float64) for k, v in args.items()}, layout, "reference")


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
    assert_close(value_and_gradients(args, LAYOUTS[layout], "mosaic_gpu"), expected(args, LAYOUTS[layout]), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("length", [2, 8, 13])
def test_without_bias_and_state(interpreter, length):
    """Rows shorter than the taps, of whole pieces, of pieces that overlap by three tokens."""
    args = {name: value for name, value in inputs(length=length).items() if name in ("x", "weight")}
    assert_close(value_and_gradients(args, {}, "mosaic_gpu"), expected(args, {}), 1e-6)


def test_poisoned_padding_never_leaks(interpreter):
    args, layout = inputs(), LAYOUTS[LAYOUT]
    poisoned = {**args, "x": np.where(layout["mask"][..., None], args["x"], np.nan)}
    got = value_and_gradients(poisoned, layout, "mosaic_gpu")
    assert_close(got, expected(args, layout), 1e-6)
    assert not got[0][0][~layout["mask"]].any()


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_low_precision(interpreter, dtype):
    """Against the reference at the same rounded inputs: y and dx are rounded once, sums over tokens are float32."""
    half = {k: jnp.asarray(v, dtype if k == "x" else jnp.float32) for k, v in inputs().items()}
    (y, state), gradients = value_and_gradients(half, {}, "mosaic_gpu")
    wide = {k: v.astype(jnp.float32) for k, v in half.items()}
    (want, want_state), want_gradients = expected(wide, {})
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
    assert_close(value_and_gradients(args, {}, "mosaic_gpu"), expected(args, {}), 1e-6)
    bare = {name: args[name] for name in ("x", "weight")}
    assert_close(value_and_gradients(bare, {}, "mosaic_gpu"), expected(bare, {}), 1e-6)


def test_few_tokens_in_place(monkeypatch):
    """As lowered for a GPU: the state's operand is an output, and XLA may donate it to that."""
    monkeypatch.setattr(lanes, "INTERPRET", None)
    jax.clear_caches()  # the kernel is jitted, and may know the interpreter
    args = {k: jnp.asarray(v) for k, v in inputs(length=1, batch=2, width=256).items()}
    state = args.pop("initial_state")

    def step(state, args):
        return mosaic_gpu.few_tokens("silu", **args, state=state)

    lowered = jax.jit(step, donate_argnums=0).trace(state, args).lower(lowering_platforms=("cuda",)).as_text()
    (alias,) = re.findall(r"output_operand_alias<(.*)>", lowered)
    assert f"operand_index = {len(args)}" in alias
    several = jax.tree.map(lambda x: jnp.stack([x, x]), (state, args))
    jax.jit(jax.vmap(step)).trace(*several).lower(lowering_platforms=("cuda",))
    jax.clear_caches()


@pytest.mark.slow
def test_vmap(interpreter):
    args = [inputs(seed=seed) for seed in (0, 1)]
    f = functools.partial(value_and_gradients, static=LAYOUTS["plain"], implementation="mosaic_gpu")
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *args)
    want = jax.tree.map(lambda *x: np.stack(x), *(expected(a, LAYOUTS["plain"]) for a in args))
    assert_close(jax.vmap(f)(stacked), want, 1e-6)


def test_reasons(monkeypatch):
    monkeypatch.setattr(lanes, "INTERPRET", None)
    facts = dict(batch=1, length=32, channels=4, taps=4, dtype=np.dtype("float32"))
    assert "needs an NVIDIA GPU" in mosaic_gpu.supports(platform="cpu", **facts)
    assert "float64" in mosaic_gpu.supports(platform="cuda", **facts | dict(dtype=np.dtype("float64")))
    assert "2^31" in mosaic_gpu.supports(platform="cuda", **facts | dict(length=2**30))
    for length, name in ((1, "xla"), (few.FEW, "xla"), (few.FEW + 1, "mosaic_gpu")):
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
        assert threads >= 2 * tuning.MULTIPROCESSORS * tuning.THREADS


needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="jax's CUDA plug-in is not installed",
)


@needs_plugin
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
    command = [sys.executable, str(HERE / "compile_short_conv_for_h100.py"), shape, dtype, str(documents)]
    run = subprocess.run(command, env=os.environ | dict(MOSAIC_GPU_DUMP_PTXAS="1"), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    said = run.stdout + run.stderr
    pattern = r"entry function 'body_mosaic[^']*'.*\n.*\n.*?(\d+) bytes spill stores"
    spilled = [int(n) for n in re.findall(pattern, said)]
    assert len(spilled) == 2 and max(spilled) <= most_spilled, said


@needs_plugin
@pytest.mark.parametrize("shape, dtype", [("1x1x1536x4", "bfloat16"), ("64x8x2048x8", "float32")])
def test_a_few_tokens_compile_in_place(shape, dtype):
    """The donated state is read and written by one kernel, and never copied."""
    command = [sys.executable, str(HERE / "compile_short_conv_for_h100.py"), shape, dtype, "0"]
    run = subprocess.run(command, env=os.environ | dict(MOSAIC_GPU_DUMP_PTXAS="1"), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.findall(r"(\d+) bytes spill stores", run.stdout + run.stderr) == ["0"]
