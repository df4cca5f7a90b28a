"""The TPU kernels of linear attention: their numbers in Pallas's TPU interpreter, their compilation ahead of time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.interpreter import interpret
from seqmodels.kernels.linear_attention import linear_attention, mosaic_tpu
from tests.kernels.helpers import (
    assert_close,
    assert_finite,
    documents,
    expected,
    needs_libtpu,
    poisoned,
    random_documents,
    stacked,
    value_and_gradients,
)
from tests.kernels.inputs import extreme_decays
from tests.kernels.inputs import linear_attention_inputs as inputs
from tests.kernels.isolation import check_isolation

SHAPE = dict(batch=1, length=21)  # two chunks, two groups of two heads, padding on every axis


@pytest.fixture
def interpreter(tpu_interpreter, monkeypatch):
    """Chunks of 16 tokens."""
    monkeypatch.setattr(mosaic_tpu, "TOKENS", 16)


run = functools.partial(value_and_gradients, linear_attention, implementation="mosaic_tpu")


def assert_equals_reference(args, static, options=None):
    got = run(args, static, options=options)
    assert_finite(got)
    assert_close(got, expected(linear_attention, args, static, options), 1e-5)


def packed(length=21, batch=1, **layout):
    return documents(batch=batch, length=length, **layout)


CASES = {
    "packed and padded": (dict(), packed(), {}),
    "exclusive with bonus": (dict(groups=4, keys=17, bonus=True), packed(), dict(read="exclusive", scale=0.7)),
    "constant decays, normalised": (
        dict(groups=1, decay="constant", normalise=True),
        packed(packed=False),
        dict(normalise=True),
    ),
}


@pytest.mark.parametrize(
    "case", ["packed and padded", *(pytest.param(c, marks=pytest.mark.slow) for c in list(CASES)[1:])]
)
def test_equals_float64_reference(interpreter, case):
    shape, static, options = CASES[case]
    assert_equals_reference(inputs(**SHAPE | shape), static, options)


def test_isolation(interpreter):
    """What is not finite in one document, in padding or in a dropped state reaches no other document."""
    operation = functools.partial(linear_attention, implementation="mosaic_tpu")
    check_isolation(operation, inputs(**SHAPE | dict(batch=2)), ("q", "k", "v", "log_decay"), 1e-5)


def test_extreme_decays(interpreter):
    args = inputs(**SHAPE)
    args["log_decay"] = extreme_decays(args["log_decay"].shape)
    assert_equals_reference(args, packed())


def test_poisoned_padding_never_leaks(interpreter):
    args, static = inputs(**SHAPE), packed()
    hidden = poisoned(args, static["mask"], ("q", "k", "v", "log_decay"))
    assert_close(run(hidden, static), run(args, static), 1e-7)


@pytest.mark.slow
def test_random_documents(interpreter):
    """Any change of documents, any mask, at one shape."""

    @settings(max_examples=6, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(0, 2**16), changes=st.floats(0, 1), real=st.floats(0, 1), first=st.integers(0, 2))
    def check(seed, changes, real, first):
        assert_equals_reference(inputs(**SHAPE, seed=seed), random_documents(seed, 1, 21, changes, real, first))

    check()


def test_bfloat16(interpreter):
    args = inputs(batch=1, length=40, groups=1, heads=2, keys=16, values=8)
    half = {k: jnp.asarray(v, jnp.bfloat16 if k in "qkv" else jnp.float32) for k, v in args.items()}
    (y, state), gradients = got = run(half, {})
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert {k: v.dtype for k, v in gradients.items()} == {k: v.dtype for k, v in half.items()}
    assert_close(got, expected(linear_attention, half, {}), 1e-2)


def test_no_races(interpreter):
    """Two cores share sequences and groups; no core reads or writes what the other may be writing."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    with interpret(detect_races=True, num_cores_or_threads=2):
        assert_equals_reference(inputs(**SHAPE), {})
    assert not interpret_pallas_call.races.races_found


@pytest.mark.slow
def test_vmap(interpreter):
    args = [inputs(batch=1, length=3, seed=seed) for seed in (0, 1)]
    want = stacked([expected(linear_attention, a, {}) for a in args])
    assert_close(jax.vmap(lambda a: run(a, {}))(stacked(args)), want, 1e-5)


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


@needs_libtpu
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
