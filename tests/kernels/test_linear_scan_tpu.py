"""The TPU kernels of the linear scan: their numbers in Pallas's interpreter, their compilation ahead of time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.interpreter import interpret
from seqmodels.kernels.linear_scan import linear_scan, mosaic_tpu
from tests.kernels.helpers import (
    assert_close,
    assert_finite,
    documents,
    expected,
    needs_libtpu,
    stacked,
    value_and_gradients,
)
from tests.kernels.inputs import extreme_decays, linear_scan_inputs
from tests.kernels.isolation import check_isolation

LENGTH, WIDTH = 27, 130  # two chunks, the last one not whole, and two blocks of channels
TIME = ("log_decay", "x")
inputs = functools.partial(linear_scan_inputs, length=LENGTH, width=WIDTH)
run = functools.partial(value_and_gradients, linear_scan, implementation="mosaic_tpu")


@pytest.fixture
def interpreter(tpu_interpreter, monkeypatch):
    """Chunks of 16 tokens in tiles of 8, and blocks of 128 channels; loops that are compiled sooner."""
    monkeypatch.setattr(mosaic_tpu, "TOKENS", 16)
    monkeypatch.setattr(mosaic_tpu, "TILE", 8)
    monkeypatch.setattr(mosaic_tpu, "UNROLL", 2)
    monkeypatch.setattr(mosaic_tpu, "WIDTH", 128)


@pytest.mark.parametrize("reverse", [False, True])
def test_equals_float64_reference(interpreter, reverse):
    """Documents, padding within the rows, and a state."""
    args, options, layout = inputs(), dict(reverse=reverse), documents(length=LENGTH)
    assert_close(run(args, layout, options=options), expected(linear_scan, args, layout, options), 1e-6)


def test_without_documents(interpreter, monkeypatch):
    """Whole chunks; a block of several registers of channels."""
    monkeypatch.setattr(mosaic_tpu, "WIDTH", 512)
    args = linear_scan_inputs(length=32, width=256)
    assert_close(run(args, {}, patched="wide blocks"), expected(linear_scan, args, {}), 1e-6)


def test_what_is_not_finite_stays_in_its_document(interpreter):
    """Padding holds NaN too."""
    check_isolation(functools.partial(linear_scan, implementation="mosaic_tpu"), inputs(), TIME)


def test_extreme_decays(interpreter):
    """Also the logarithm of zero."""
    args, layout = inputs(), documents(length=LENGTH, padded=False)
    args["log_decay"] = extreme_decays(args["log_decay"].shape)
    args["log_decay"][:, 7:9] = -np.inf
    got = run(args, layout)
    assert_finite(got)
    assert_close(got, expected(linear_scan, args, layout), 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(interpreter, dtype):
    """Against the reference at the same rounded inputs: h and dx are rounded once."""
    half = {k: jnp.asarray(v, dtype if k == "x" else jnp.float32) for k, v in inputs().items()}
    (h, state), gradients = run(half, {})
    (want, want_state), want_gradients = expected(linear_scan, half, {})
    assert h.dtype == gradients["x"].dtype == dtype
    assert state.dtype == gradients["log_decay"].dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(h, np.float32), want, rtol=2**-8, atol=1e-6)
    assert_close(state, want_state, 1e-6)
    assert_close(gradients, want_gradients, 2**-7)  # the functional's weights are rounded, too


def test_no_races(interpreter):
    """Two cores share the work; no core reads or writes what the other may be writing."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    with interpret(detect_races=True, num_cores_or_threads=2):
        args = inputs(length=20)
        assert_close(run(args, {}), expected(linear_scan, args, {}), 1e-6)
    assert not interpret_pallas_call.races.races_found


def test_vmap(interpreter):
    args = [inputs(length=1, width=3, seed=seed) for seed in (0, 1)]
    want = stacked([expected(linear_scan, a, {}) for a in args])
    assert_close(jax.vmap(lambda a: run(a, {}))(stacked(args)), want, 1e-6)


def test_reasons():
    facts = dict(shape=(1, 32, 4), dtype=np.dtype("float32"), accumulator=np.dtype("float32"))
    assert mosaic_tpu.supports(platform="tpu", **facts) is None
    assert "needs a TPU" in mosaic_tpu.supports(platform="cuda", **facts)
    assert "complex64" in mosaic_tpu.supports(platform="tpu", **facts | dict(dtype=np.dtype("complex64")))
    assert "float64" in mosaic_tpu.supports(platform="tpu", **facts | dict(accumulator=np.dtype("float64")))
    assert "empty" in mosaic_tpu.supports(platform="tpu", **facts | dict(shape=(0, 32, 4)))
    if jax.default_backend() != "tpu":
        with pytest.raises(UnsupportedError, match="needs a TPU"):
            linear_scan(**inputs(), implementation="mosaic_tpu")


# chip, shape of x, dtype, documents, reverse
COMPILED = [
    ("v5e", (2, 2048, 4096), "bfloat16", True, False),
    ("v5p", (1, 300, 200), "float32", True, True),
    ("v6e", (3, 33, 1000), "bfloat16", False, True),
    ("v6e", (1, 1, 3), "float16", True, False),
]


@needs_libtpu
@pytest.mark.parametrize("chip, shape, dtype, documents, reverse", COMPILED)
def test_compiles_for_tpu(chip, shape, dtype, documents, reverse):
    """Forward and gradient: the interpreter takes what the compiler refuses."""
    from benchmarks import tpu_aot

    array = functools.partial(jax.ShapeDtypeStruct, sharding=tpu_aot.sharding(chip))
    args = (array(shape, jnp.float32), array(shape, dtype), array((shape[0], shape[2]), jnp.float32))
    ids = array(shape[:2], jnp.int32) if documents else None

    def gradients(args, ids, dh):
        h, pull = jax.vjp(lambda args: mosaic_tpu.linear_scan(*args, ids, None, None, reverse=reverse)[0], args)
        return h, pull(dh)

    text = jax.jit(gradients).lower(args, ids, args[1]).compile().as_text()
    assert "linear_scan_forward" in text and "linear_scan_backward" in text
