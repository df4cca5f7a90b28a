"""The TPU kernels of linear attention: their numbers in Pallas's TPU interpreter, their compilation ahead of time."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from test_linear_attention import EXCLUSIVE, NORMALISED, inputs
from test_selective_scan import assert_close, documents

from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.linear_attention import linear_attention, mosaic_tpu

SHAPE = dict(batch=1, length=21)  # two chunks, two groups of two heads, padding on every axis


@pytest.fixture
def interpreter(monkeypatch):
    """Kernels run in the interpreter, whose memory starts as NaN, in chunks of 16 tokens."""
    pltpu.reset_tpu_interpret_mode_state()
    monkeypatch.setattr(mosaic_tpu, "INTERPRET", pltpu.InterpretParams())
    monkeypatch.setattr(mosaic_tpu, "TOKENS", 16)


@functools.partial(jax.jit, static_argnames=("options", "implementation"))
def value_and_gradients(args, static, options=(), implementation="mosaic_tpu"):
    """y on real tokens, the final state, and the gradients of a random functional of both."""

    def outputs(args):
        y, state = linear_attention(**args, **static, **dict(options), implementation=implementation)
        return (jnp.where(static["mask"][..., None, None], y, 0) if "mask" in static else y), state

    results, pull = jax.vjp(outputs, args)
    draw = np.random.default_rng(7)
    (gradients,) = pull(tuple(jnp.asarray(draw.normal(size=x.shape), x.dtype) for x in results))
    return results, gradients


def expected(args, static, options=()):
    """The same by the reference in float64, from the same numbers."""
    with jax.enable_x64(True):
        double = {k: np.asarray(v, np.float64) for k, v in args.items()}
        return value_and_gradients(double, static, options, implementation="reference")


def assert_equals_reference(args, static, options=(), tolerance=1e-5):
    got = value_and_gradients(args, static, options)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    assert_close(got, expected(args, static, options), tolerance)


def packed(length=21, batch=1, **layout):
    return documents(batch=batch, length=length, **layout)


CASES = {
    "packed and padded": (dict(), packed(), {}),
    "exclusive with bonus": (dict(groups=4, keys=17, bonus=True), packed(), EXCLUSIVE | dict(scale=0.7)),
    "constant decays, normalised": (
        dict(groups=1, decay="constant", normalise=True),
        packed(packed=False),
        NORMALISED,
    ),
}


@pytest.mark.parametrize(
    "case", ["packed and padded", *(pytest.param(c, marks=pytest.mark.slow) for c in list(CASES)[1:])]
)
def test_equals_float64_reference(interpreter, case):
    shape, static, options = CASES[case]
    assert_equals_reference(inputs(**SHAPE | shape), static, tuple(options.items()))


def test_extreme_decays(interpreter):
    args, draw = inputs(**SHAPE), np.random.default_rng(3)
    shape = args["log_decay"].shape
    args["log_decay"] = np.float32(draw.choice([0.0, -1e4, -3e-5, -0.4], shape, p=[0.4, 0.1, 0.3, 0.2]))
    assert_equals_reference(args, packed())


def test_poisoned_padding_never_leaks(interpreter):
    args, static = inputs(**SHAPE), packed()
    hole = lambda v: static["mask"].reshape(*static["mask"].shape, *[1] * (v.ndim - 2))  # noqa: E731
    time = ("q", "k", "v", "log_decay")
    poisoned = {k: np.where(hole(v), v, np.nan).astype(v.dtype) if k in time else v for k, v in args.items()}
    assert_close(value_and_gradients(poisoned, static), value_and_gradients(args, static), 1e-7)


@pytest.mark.slow
def test_random_documents(interpreter):
    """Any change of documents, any mask, at one shape."""

    @settings(max_examples=6, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(0, 2**16), changes=st.floats(0, 1), real=st.floats(0, 1), first=st.integers(0, 2))
    def check(seed, changes, real, first):
        draw = np.random.default_rng(seed)
        static = dict(
            segment_ids=jnp.asarray(np.cumsum(draw.random((1, 21)) < changes, axis=1), jnp.int32),
            initial_segment=jnp.full(1, first, jnp.int32),
            mask=jnp.asarray(draw.random((1, 21)) < real),
        )
        assert_equals_reference(inputs(**SHAPE, seed=seed), static)

    check()


def test_bfloat16(interpreter):
    args = inputs(batch=1, length=40, groups=1, heads=2, keys=16, values=8)
    half = {k: jnp.asarray(v, jnp.bfloat16 if k in "qkv" else jnp.float32) for k, v in args.items()}
    (y, state), gradients = got = value_and_gradients(half, {})
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert {k: v.dtype for k, v in gradients.items()} == {k: v.dtype for k, v in half.items()}
    assert_close(got, expected(half, {}), 1e-2)


def test_no_races(interpreter, monkeypatch):
    """Two cores share sequences and groups; no core reads or writes what the other may be writing."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    monkeypatch.setattr(mosaic_tpu, "INTERPRET", pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2))
    assert_equals_reference(inputs(**SHAPE), {})
    assert not interpret_pallas_call.races.races_found


@pytest.mark.slow
def test_vmap(interpreter):
    args = [inputs(batch=1, length=3, seed=seed) for seed in (0, 1)]
    got = jax.vmap(lambda a: value_and_gradients(a, {}))(jax.tree.map(lambda *x: jnp.stack(x), *args))
    want = jax.tree.map(lambda *x: np.stack(x), *(expected(a, {}) for a in args))
    assert_close(got, want, 1e-5)


FACTS = dict(shape=(1, 8, 1, 4, 8, 8), dtype=np.dtype("float32"), decay="head", chunk=None)


def test_reasons():
    assert mosaic_tpu.supports(platform="tpu", **FACTS) is None
    assert "needs a TPU" in mosaic_tpu.supports(platform="cuda", **FACTS)
    assert "float64" in mosaic_tpu.supports(platform="tpu", **FACTS | dict(dtype=np.dtype("float64")))
    assert "of channels" in mosaic_tpu.supports(platform="tpu", **FACTS | dict(decay="channel"))
    assert "asked for are 64" in mosaic_tpu.supports(platform="tpu", **FACTS | dict(chunk=64))
    assert "VMEM" in mosaic_tpu.supports(platform="tpu", **FACTS | dict(shape=(1, 8, 1, 512, 128, 256)))
    if jax.default_backend() != "tpu":
        with pytest.raises(UnsupportedError, match="needs a TPU"):
            linear_attention(**inputs(), implementation="mosaic_tpu")


# batch, length, Hk, H, K, V
SSD, DENSE_RETNET, AT_THE_LIMIT = (2, 256, 1, 8, 128, 64), (1, 256, 2, 2, 384, 1536), (1, 256, 1, 1, 640, 1408)
COMPILED = [
    ("v5e", SSD, "bfloat16", "inclusive"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            ("v5p", SSD, "bfloat16", "inclusive"),
            ("v6e", SSD, "bfloat16", "inclusive"),
            ("v5p", DENSE_RETNET, "bfloat16", "inclusive"),
            ("v5p", AT_THE_LIMIT, "bfloat16", "inclusive"),
            ("v6e", (1, 17, 2, 4, 3, 5), "float16", "exclusive"),
        ]
    ),
]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(("chip", "shape", "dtype", "read"), COMPILED)
def test_compiles_for_tpu(chip, shape, dtype, read):
    """Forward and gradient; the interpreter takes what the compiler refuses. VMEM suffices where `supports` says so."""
    from benchmarks import tpu_aot

    assert mosaic_tpu.supports(platform="tpu", **FACTS | dict(shape=shape, dtype=np.dtype(dtype))) is None
    batch, length, groups, heads, keys, values = shape
    one = tpu_aot.sharding(chip)

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=one)

    state = array(batch, heads, keys, values, dtype=jnp.float32)
    args = dict(q=array(batch, length, groups, keys), k=array(batch, length, groups, keys), initial_state=state)
    args |= dict(v=array(batch, length, heads, values), log_decay=array(batch, length, heads, dtype=jnp.float32))
    absent = dict.fromkeys(("bonus", "initial_segment", "mask"))

    def gradients(args, segments, cotangents):
        def attend(args):
            return mosaic_tpu.linear_attention(
                **args, **absent, segment_ids=segments, scale=0.5, read=read, chunk=None, dtype=jnp.dtype(dtype)
            )

        results, pull = jax.vjp(attend, args)
        return results, pull(cotangents)

    segments = array(batch, length, dtype=jnp.int32)
    jax.jit(gradients).lower(args, segments, (args["v"], state)).compile()
