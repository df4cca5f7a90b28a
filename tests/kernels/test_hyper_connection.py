"""A step of hyper-connections: the definition, and what does not fit. test_hyper_connection_gpu.py has the kernels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from seqmodels import parallel
from seqmodels.kernels import hyper_connection as op
from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.hyper_connection import hyper_connection, mosaic_gpu
from seqmodels.training.sharding import AXES, RULES
from tests.kernels.helpers import assert_close
from tests.kernels.hyper_cases import EPS, by_hand, inputs, reference, run


def test_the_reference_is_the_equations_and_has_their_gradients():
    """In float64; and in float32 and bfloat16 it differs by their rounding."""
    args = inputs()
    results, gradients = reference(args)
    assert_close(results, by_hand(args), 1e-14)
    draw = np.random.default_rng(7)
    weights = [draw.normal(size=x.shape) for x in results]
    for name, x in args.items():
        move, far = np.random.default_rng(1).normal(size=x.shape), 1e-6
        ends = [by_hand(args | {name: np.asarray(x, np.float64) + side * far * move}) for side in (-1, 1)]
        slope = sum(np.sum(w * (b - a)) for w, a, b in zip(weights, *ends, strict=True)) / (2 * far)
        np.testing.assert_allclose(np.sum(np.asarray(gradients[name]) * move), slope, rtol=1e-6, err_msg=name)
    assert_close(run(args, "reference"), (results, gradients), 1e-6)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_on_a_mesh():
    """Rows and time apart: each device has its own tokens, and the gradients of what they share are added up."""
    args = inputs(length=8)
    mesh = jax.make_mesh([dict(data=2, sequence=4).get(axis, 1) for axis in AXES], AXES, (AxisType.Auto,) * len(AXES))

    def loss(args):
        results = parallel.hyper_connection(**args, eps=EPS, implementation="reference")
        return sum(jnp.sum(jnp.sin(x)) for x in results)

    want = jax.jit(jax.grad(loss))(args)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        program = jax.jit(jax.grad(loss)).lower(args).compile()
    assert "all-gather" not in program.as_text()
    assert_close(program(args), want, 1e-6)


def test_the_reference_is_chosen_everywhere():
    """Until somebody has measured the kernels."""
    assert {op.choose(platform)[0] for platform in ("cpu", "cuda", "tpu")} == {"reference"}


def test_reasons():
    facts = dict(shape=(2, 3, 4, 64), dtype=np.dtype("bfloat16"))
    assert mosaic_gpu.supports(platform="cuda", **facts) is None
    assert "needs an NVIDIA GPU" in mosaic_gpu.supports(platform="cpu", **facts)
    assert "float64" in mosaic_gpu.supports(platform="cuda", **facts | dict(dtype=np.dtype("float64")))
    assert "5 streams" in mosaic_gpu.supports(platform="cuda", **facts | dict(shape=(2, 3, 5, 64)))
    assert "D is 48" in mosaic_gpu.supports(platform="cuda", **facts | dict(shape=(2, 3, 4, 48)))
    assert "2^31" in mosaic_gpu.supports(platform="cuda", **facts | dict(shape=(2, 2**20, 4, 1024)))
    if jax.default_backend() != "gpu":
        with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU"):
            hyper_connection(**inputs(), eps=EPS, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("streams", jnp.zeros((2, 3, 32)), r"streams are float32\[2, 3, 32\]; allowed: numbers \[B, T, n, D\]"),
        ("y", jnp.zeros((2, 3, 32), "bfloat16"), r"y is bfloat16\[2, 3, 32\]; allowed with .*: float32\[2, 3, 32\]"),
        ("matrix", jnp.zeros((3, 32, 3)), r"matrix is float32\[3, 32, 3\]; allowed with .*: float32\[3, 32, 6\]"),
    ],
)
def test_what_does_not_fit_is_refused(name, wrong, words):
    with pytest.raises(ValueError, match=words):
        hyper_connection(**inputs() | {name: wrong}, eps=EPS)
