"""JAX's splash attention for TPUs, by name: in Pallas's interpreter, and compiled for TPUs that are not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels.attention import attention, splash
from seqmodels.kernels.attention.arguments import Inputs, Options, Tokens
from seqmodels.kernels.attention.biases import Alibi
from seqmodels.kernels.attention.masks import BigBird, Mask, Strided
from seqmodels.kernels.dispatch import UnsupportedError
from tests.kernels.helpers import assert_close, needs_libtpu

T, D = 256, 64
IDS = np.cumsum(np.random.default_rng(1).random((2, T)) < 0.03, axis=1).astype(np.int32)
CASES = {
    "documents": dict(segment_ids=IDS),
    "full": dict(causal=False, scale=0.2),
    "window": dict(window=50, segment_ids=IDS),
    "pattern, capped": dict(pattern=Strided(2, block=64), softcap=3.0),
}


def inputs(length=T):
    draw = np.random.default_rng(0)
    heads = dict(q=2, k=1, v=1)
    return {name: draw.normal(size=(2, length, n, D)).astype(np.float32) for name, n in heads.items()}


def value_and_gradients(args, options, implementation):
    def run(args):
        o = attention(**args, **options, implementation=implementation)
        return jnp.sum(jnp.sin(o)), o

    return jax.jit(jax.grad(run, has_aux=True))(args)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(tpu_interpreter, case):
    got = value_and_gradients(inputs(), CASES[case], "splash")
    assert_close(got, value_and_gradients(inputs(), CASES[case], "reference"), 5e-6)


def test_says_why_not(tpu_interpreter):
    args = inputs()
    for options, reason in (
        (dict(positions=np.zeros((2, T), np.int32)), "takes no positions"),
        (dict(key_mask=np.ones((2, T), bool)), "no masks of keys"),
        (dict(segment_ids=IDS, key_segment_ids=IDS + 1), "no documents of the keys other than the queries'"),
        (dict(bias=Alibi(), bias_weights=np.ones((2, 1))), "takes no biases"),
    ):
        with pytest.raises(UnsupportedError, match=reason):
            attention(**args, **options, implementation="splash")
    with pytest.raises(UnsupportedError, match="a multiple of 128, not 100 and 100"):
        attention(**inputs(100), implementation="splash")


def test_needs_a_tpu():
    with pytest.raises(UnsupportedError, match="needs a TPU"):
        attention(**inputs(), implementation="splash")


@needs_libtpu
@pytest.mark.parametrize(
    "chip, dtype, mask",
    [
        ("v5e", "bfloat16", Mask()),
        ("v5p", "float32", Mask(window=512)),
        ("v6e", "bfloat16", Mask(pattern=BigBird(block=128))),
    ],
)
def test_compiles_for_tpu(chip, dtype, mask):
    """Forward and backward: the interpreter takes what the compiler refuses."""
    from benchmarks import tpu_aot

    sharding = tpu_aot.sharding(chip)
    q, k = (jax.ShapeDtypeStruct((1, 4096, heads, D), dtype, sharding=sharding) for heads in (8, 2))
    ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32, sharding=sharding)

    def loss(q, k, v, ids):
        o = splash.attention(Inputs(q, k, v), Tokens(segment_ids=ids), Options(mask, D**-0.5))
        return jnp.sum(o.astype(jnp.float32))

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, ids).compile().as_text()
    assert text.count("splash_mha") >= 3  # forward, dq, and dk with dv
