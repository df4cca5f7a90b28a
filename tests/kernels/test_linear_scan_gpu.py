"""The GPU kernels of the linear scan: their numbers in Pallas's GPU interpreter, their compilation ahead of time.

The interpreter compiles each kernel anew for every shape, for seconds; so one shape has several chunks of time, the
last one not whole, and channels that are padded.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels import linear_scan as op
from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.lanes import THREADS, processors
from seqmodels.kernels.linear_scan import linear_scan, mosaic_gpu
from seqmodels.kernels.tuning import UNROLLED
from tests.kernels.helpers import (
    assembled,
    assert_close,
    documents,
    expected,
    needs_cuda_plugin,
    poisoned,
    stacked,
    value_and_gradients,
)
from tests.kernels.inputs import linear_scan_inputs
from tests.kernels.isolation import check_isolation

LENGTH = 21
inputs = functools.partial(linear_scan_inputs, length=LENGTH)
run = functools.partial(value_and_gradients, linear_scan, implementation="mosaic_gpu")


@pytest.fixture
def interpreter(gpu_interpreter, monkeypatch):
    """Chunks of 8 tokens, two of which are worked on together: to be compiled sooner."""
    monkeypatch.setattr(mosaic_gpu, "CHUNK", 8)
    monkeypatch.setattr(mosaic_gpu, "TOGETHER", 2)


@pytest.mark.parametrize(
    ("packed", "reverse", "pieces"),
    [
        (True, False, 2),
        pytest.param(True, True, 1, marks=pytest.mark.slow),
        pytest.param(False, False, 1, marks=pytest.mark.slow),
        pytest.param(True, False, 1, marks=pytest.mark.slow),
        pytest.param(True, True, 2, marks=pytest.mark.slow),
    ],
)
def test_equals_float64_reference(interpreter, monkeypatch, packed, reverse, pieces):
    monkeypatch.setattr(mosaic_gpu, "pieces_of", lambda *sizes: pieces)
    args, options = inputs(), dict(reverse=reverse)
    static = documents(length=LENGTH) if packed else {}
    got = run(args, static, options=options, patched=str(pieces))
    assert_close(got, expected(linear_scan, args, static, options), 1e-6)


def test_what_is_not_finite_stays_in_its_document(interpreter, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "pieces_of", lambda *sizes: 2)
    check_isolation(functools.partial(linear_scan, implementation="mosaic_gpu"), inputs(), ("log_decay", "x"))


@pytest.mark.slow
def test_poisoned_padding_never_leaks(interpreter):
    args, static = inputs(), documents(length=LENGTH)
    hidden = poisoned(args, static["mask"], ("log_decay", "x"))
    assert_close(run(hidden, static), expected(linear_scan, args, static), 1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.slow
def test_low_precision(interpreter, dtype):
    """Against the reference at the same rounded inputs: h and dx are rounded once."""
    half = {k: jnp.asarray(v, dtype if k == "x" else jnp.float32) for k, v in inputs().items()}
    (h, state), gradients = run(half, {})
    (want, want_state), want_gradients = expected(linear_scan, half, {})
    assert h.dtype == gradients["x"].dtype == dtype
    assert state.dtype == gradients["log_decay"].dtype == jnp.float32
    rounding = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    np.testing.assert_allclose(np.asarray(h, np.float32), want, rtol=rounding, atol=1e-6)
    assert_close(state, want_state, 1e-6)
    assert_close(gradients, want_gradients, 2 * rounding)  # the functional's weights are rounded, too


@pytest.mark.slow
def test_vmap(interpreter):
    args = [inputs(seed=seed) for seed in (0, 1)]
    want = stacked([expected(linear_scan, a, {}) for a in args])
    assert_close(jax.vmap(lambda a: run(a, {}))(stacked(args)), want, 1e-6)


def test_reasons():
    facts = dict(shape=(1, 32, 4), dtype=np.dtype("float32"), accumulator=np.dtype("float32"))
    assert "needs an NVIDIA GPU" in mosaic_gpu.supports(platform="cpu", **facts)
    assert "complex64" in mosaic_gpu.supports(platform="cuda", **facts | dict(dtype=np.dtype("complex64")))
    assert "float64" in mosaic_gpu.supports(platform="cuda", **facts | dict(accumulator=np.dtype("float64")))
    assert "2^31" in mosaic_gpu.supports(platform="cuda", **facts | dict(shape=(1, 2**24, 128)))
    for length, name in ((1, "xla"), (UNROLLED, "xla"), (UNROLLED + 1, "mosaic_gpu")):
        assert op.choose("cuda", **facts | dict(shape=(1, length, 4)))[0] == name
    assert mosaic_gpu.supports(platform="cuda", named=True, **facts | dict(shape=(1, 1, 4))) is None
    if jax.default_backend() != "gpu":
        with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU"):
            linear_scan(**inputs(), implementation="mosaic_gpu")


@pytest.mark.parametrize(
    "sizes", [(8, 2048, 4096), (1, 65_536, 4096), (1, 262_144, 1024), (1, 100, 128), (2, 256, 256)]
)
def test_pieces_fill_the_gpu(sizes):
    batch, length, width = sizes
    pieces = mosaic_gpu.pieces_of(*sizes)
    blocks = batch * width // THREADS
    assert pieces == 1 or (3 * blocks < processors() and length / pieces >= mosaic_gpu.SHORTEST)
    assert 3 * blocks * pieces >= processors() or length < 4 * mosaic_gpu.SHORTEST


@needs_cuda_plugin
@pytest.mark.parametrize(
    ("shape", "dtype", "documents"),
    [("8x2048x4096", "bfloat16", 1), pytest.param("1x4100x130", "float32", 0, marks=pytest.mark.slow)],
)
def test_compiles_into_registers(shape, dtype, documents):
    """The interpreter takes what the compiler refuses. Two blocks share a multiprocessor."""
    shared, spilled = assembled("linear_scan", shape, dtype, documents)
    assert len(spilled) == (2 if shape.startswith("8") else 4) and not any(spilled)
    assert all(size <= mosaic_gpu.SHARED for size in shared)
