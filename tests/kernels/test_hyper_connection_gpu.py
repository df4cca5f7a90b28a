"""The GPU kernels of a step of hyper-connections, in Pallas's GPU interpreter, and compiled ahead of time.

On a GPU the same tests run the kernels as they are.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.config import complete_model
from seqmodels.configs.base import base
from seqmodels.fields.mlp import MLP
from seqmodels.model import build
from tests.kernels.helpers import assembled, assert_close, needs_cuda_plugin, stacked
from tests.kernels.hyper_cases import inputs, reference, run

ON_GPU = jax.default_backend() == "gpu"
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "sizes",
    [
        dict(length=5, width=64),  # two blocks, and the last tokens are not a whole one; several channels a thread
        pytest.param(dict(batch=1, length=1, streams=1), marks=slow),
        pytest.param(dict(streams=4, width=96), marks=slow),
        *(dict(batch=3, length=401, streams=4, width=width) for width in ((640, 768, 2048) if ON_GPU else ())),
    ],
    ids=str,
)
def test_equals_the_float64_reference(gpu_interpreter, sizes):
    args = inputs(**sizes)
    assert_close(run(args, "mosaic_gpu"), reference(args), 2e-6)


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=[] if ON_GPU else slow), "float16"])
def test_low_precision(gpu_interpreter, dtype):
    """Against the reference at the same rounded inputs: each result is rounded once."""
    args = inputs(width=768 if ON_GPU else 64, dtype=dtype)
    (results, gradients), (want, want_gradients) = run(args, "mosaic_gpu"), reference(args)
    rounding = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    assert [x.dtype.name for x in results] == [dtype, dtype, "float32"]
    assert {k: x.dtype for k, x in gradients.items()} == {k: x.dtype for k, x in args.items()}
    for x, y in zip(results[:2], want[:2], strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), y, rtol=rounding, atol=2e-6)
    assert_close(results[2], want[2], 1e-6)
    # The gradients are of a functional whose weights are rounded, too, and use X' as it was rounded
    assert_close(gradients, want_gradients, 4 * rounding)


@slow
def test_a_model_is_the_same_as_by_xla(gpu_interpreter):
    """Its outputs, and the gradients of perturbed parameters, in steps that XLA fuses as it likes (depth/hyper.py)."""
    config = base().model
    config.update(pattern="mlp", width=64, repeats=2, depth="hyper")
    config.norm_eps = 0.1  # the streams are equal at first, and only this keeps the norm from taking their weights away
    config.mlp, draw, tokens = MLP.defaults(hidden=8), np.random.default_rng(0), jnp.arange(10).reshape(2, 5)
    config, got = complete_model(config), {}
    params = nn.unbox(build(config, 11).init(jax.random.key(0), tokens))["params"]
    params = jax.tree.map(lambda x: x + 0.2 * draw.normal(size=x.shape).astype(np.float32), params)
    weights = draw.normal(size=(2, 5, 64))
    for name in ("", "mosaic_gpu"):
        config.implementation.hyper_connection = name
        model = build(config, 11)
        loss = lambda params: jnp.sum(weights * model.apply({"params": params}, tokens)[0])  # noqa: B023, E731
        with jax.default_matmul_precision("highest"):
            got[name] = jax.jit(jax.value_and_grad(loss))(params)
    assert_close(got["mosaic_gpu"], got[""], 1e-5)


@slow
def test_vmap(gpu_interpreter):
    args = [inputs(seed=seed) for seed in (0, 1)]
    got = jax.vmap(lambda args: run(args, "mosaic_gpu"))(stacked(args))
    assert_close(got, stacked([reference(a) for a in args]), 2e-6)


def test_a_token_that_is_not_finite_stays_alone(gpu_interpreter):
    """In what other tokens get, and in their gradients; not in the gradients of what all tokens share."""
    args = inputs(length=5, width=64)
    spoilt = args | {name: args[name].at[1, 2].set(jnp.nan) for name in ("streams", "y", "weights")}
    ((new, u, post), gradients), want = run(spoilt, "mosaic_gpu"), run(args, "mosaic_gpu")
    tokens = {name: gradients[name] for name in ("streams", "y", "weights")}
    apart = np.ones((2, 5), bool)
    apart[1, 2] = False
    got = ((new, u, post), tokens)
    want = (want[0], {name: want[1][name] for name in tokens})
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[apart], y[apart]), got, want)
    assert all(np.isnan(x[1, 2]).all() for x in (new, u, post))


@needs_cuda_plugin
@pytest.mark.parametrize(
    "arguments",
    [
        ("8x2048x4x768", "bfloat16"),
        pytest.param(("1x50x4x2048", "float32"), marks=slow),
        pytest.param(("3x7x3x96", "float16"), marks=slow),
    ],
)
def test_compiles_into_registers(arguments):
    """The interpreter takes what the compiler refuses."""
    shared, spilled = assembled("hyper_connection", *arguments)
    assert spilled == [0, 0] and not any(shared)
