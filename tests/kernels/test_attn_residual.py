"""A source of Attention Residuals: the definition, and what does not fit. test_attn_residual_gpu.py has the kernel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from seqmodels import parallel
from seqmodels.kernels import attn_residual as op
from seqmodels.kernels.attn_residual import attn_residual, mosaic_gpu
from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.training.sharding import AXES, RULES
from tests.kernels.attn_residual_cases import EPS, inputs, reference, run
from tests.kernels.helpers import assert_close


def test_the_parts_of_gradients_make_those_that_jax_derives():
    """Of steps that read the source beside others, by the paper's equations in float64."""
    args, draw = inputs(), np.random.default_rng(1)
    with jax.enable_x64(True):
        v, w, g = (jnp.asarray(np.asarray(args[name], np.float64)) for name in ("value", "vectors", "reads"))
        other, total = jnp.asarray(draw.normal(size=g.shape)), jnp.asarray(draw.normal(size=g.shape[:-1]))

        def steps(v, w):
            normed = v / jnp.sqrt(jnp.mean(v**2, axis=-1, keepdims=True) + EPS)
            share = jax.nn.sigmoid(jnp.einsum("btd,kd->kbt", normed, w) - total)
            return share[..., None] * v + (1 - share[..., None]) * other, share

        (h, share), pull = jax.vjp(steps, v, w)
        want = dict(zip(("value", "vectors"), pull((g, jnp.zeros_like(share))), strict=True))
        parts = dict(weights=share, offsets=jnp.sum(g * h, axis=-1))
    results, gradients = reference(args | parts)
    assert_close(gradients, want, 1e-13)
    single = {name: np.asarray(x, np.float32) for name, x in (args | parts).items()}
    assert_close(run(single, "reference"), (results, gradients), 1e-6)
    np.testing.assert_allclose(jax.nn.sigmoid(results["scores"] - total), share, rtol=1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_on_a_mesh():
    """Rows and time apart: each device has its own tokens, and the gradients of the vectors are added up."""
    args = inputs(length=8)
    mesh = jax.make_mesh([dict(data=2, sequence=4).get(axis, 1) for axis in AXES], AXES, (AxisType.Auto,) * len(AXES))

    def loss(value, vectors):
        square = jnp.mean(jax.lax.stop_gradient(value) ** 2, axis=-1)
        results = parallel.attn_residual(value, square, vectors, eps=EPS, implementation="reference")
        return sum(jnp.sum(jnp.sin(x)) for x in results)

    given = args["value"], args["vectors"]
    gradients = jax.grad(loss, argnums=(0, 1))
    want = jax.jit(gradients)(*given)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        program = jax.jit(gradients).lower(*given).compile()
    assert "all-gather" not in program.as_text()
    assert_close(program(*given), want, 1e-6)


def test_the_reference_is_chosen_everywhere():
    """Until somebody has measured the kernel."""
    assert {op.choose(platform)[0] for platform in ("cpu", "cuda", "tpu")} == {"reference"}


def test_reasons():
    facts = dict(shape=(2, 3, 64, 5), dtype=np.dtype("bfloat16"))
    assert mosaic_gpu.supports(platform="cuda", **facts) is None
    assert "needs an NVIDIA GPU" in mosaic_gpu.supports(platform="cpu", **facts)
    assert "float64" in mosaic_gpu.supports(platform="cuda", **facts | dict(dtype=np.dtype("float64")))
    assert "129 steps" in mosaic_gpu.supports(platform="cuda", **facts | dict(shape=(2, 3, 64, 129)))
    for width in (48, 2048):
        assert f"D is {width}" in mosaic_gpu.supports(platform="cuda", **facts | dict(shape=(2, 3, width, 5)))
    assert "2^31" in mosaic_gpu.supports(platform="cuda", **facts | dict(shape=(2, 2**20, 1024, 5)))
    if jax.default_backend() != "gpu":
        with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU"):
            attn_residual(
                jnp.zeros((1, 2, 32)), jnp.ones((1, 2)), jnp.zeros((3, 32)), eps=EPS, implementation="mosaic_gpu"
            )


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("value", jnp.zeros((2, 32)), r"value is float32\[2, 32\]; allowed: numbers \[B, T, D\]"),
        ("vectors", jnp.zeros((0, 32)), r"vectors is float32\[0, 32\]; allowed with .*: float32\[1, 32\]"),
        ("mean_square", jnp.zeros((2, 4)), r"mean_square is float32\[2, 4\]; allowed with .*: float32\[2, 3\]"),
    ],
)
def test_what_does_not_fit_is_refused(name, wrong, words):
    given = dict(value=jnp.zeros((2, 3, 32)), mean_square=jnp.zeros((2, 3)), vectors=jnp.zeros((4, 32)))
    with pytest.raises(ValueError, match=words):
        attn_residual(**given | {name: wrong}, eps=EPS)
