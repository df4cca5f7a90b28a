"""The GPU kernel of Attention Residuals, a source's gradient, in Pallas's GPU interpreter, and compiled ahead of time.

On a GPU the same tests run the kernel as it is.
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
from tests.kernels.attn_residual_cases import inputs, reference, run
from tests.kernels.helpers import assembled, assert_close, needs_cuda_plugin, stacked

ON_GPU = jax.default_backend() == "gpu"
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "sizes",
    [
        dict(length=5, width=64),  # three blocks, and the last tokens are not a whole one; several channels a thread
        pytest.param(dict(width=96, steps=1), marks=slow),
        pytest.param(dict(batch=1, length=2, steps=34), marks=slow),  # more steps than threads of a warp
        *(dict(batch=3, length=401, steps=25, width=width) for width in ((640, 768, 1536) if ON_GPU else ())),
    ],
    ids=str,
)
def test_equals_the_float64_reference(gpu_interpreter, sizes):
    args = inputs(**sizes)
    assert_close(run(args, "mosaic_gpu"), reference(args), 2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=[] if ON_GPU else slow)])
def test_low_precision(gpu_interpreter, dtype):
    """Against the reference at the same rounded inputs: each result is rounded once, the vectors' gradient twice."""
    args = inputs(width=768 if ON_GPU else 32, dtype=dtype)
    (results, gradients), (want, want_gradients) = run(args, "mosaic_gpu"), reference(args)
    rounding = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    assert {k: x.dtype.name for k, x in gradients.items()} == dict(value=dtype, vectors=dtype)
    assert_close(results, want, 1e-5)
    np.testing.assert_allclose(
        np.asarray(gradients["value"], np.float32), want_gradients["value"], rtol=rounding, atol=4e-6
    )
    assert_close(gradients["vectors"], want_gradients["vectors"], 2 * rounding)


@slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_the_same_as_by_xla(gpu_interpreter, dtype):
    """Its outputs, and the gradients of perturbed parameters, which jax derives of plain sums (depth/scored.py)."""
    config = base().model
    config.update(pattern="mlp", width=32, repeats=5, depth="attnres", dtype=dtype)
    config.attnres.blocks = 2  # three steps make a source, and the last one is not whole
    config.mlp, draw, tokens = MLP.defaults(hidden=8), np.random.default_rng(0), jnp.arange(10).reshape(2, 5)
    config, got = complete_model(config), {}
    params = nn.unbox(build(config, 11).init(jax.random.key(0), tokens))["params"]
    params = jax.tree.map(lambda x: x + 0.2 * draw.normal(size=x.shape).astype(np.float32), params)
    weights = draw.normal(size=(2, 5, 32))
    for name in ("", "mosaic_gpu"):
        config.implementation.attn_residual = name
        model = build(config, 11)
        loss = lambda params: jnp.sum(weights * model.apply({"params": params}, tokens)[0])  # noqa: B023, E731
        with jax.default_matmul_precision("highest"):
            got[name] = jax.jit(jax.value_and_grad(loss))(params)
    assert_close(got["mosaic_gpu"], got[""], 1e-5 if dtype == "float32" else 0.05)


@slow
def test_vmap(gpu_interpreter):
    args = [inputs(seed=seed) for seed in (0, 1)]
    got = jax.vmap(lambda args: run(args, "mosaic_gpu"))(stacked(args))
    assert_close(got, stacked([reference(a) for a in args]), 2e-6)


@slow
def test_a_token_that_is_not_finite_stays_alone(gpu_interpreter):
    """In the gradients of other tokens."""
    args = inputs(length=5, width=64)
    spoilt = args | dict(value=args["value"].at[1, 2].set(jnp.nan), reads=args["reads"].at[1, 1, 2].set(jnp.nan))
    got, want = (run(x, "mosaic_gpu")[1]["value"] for x in (spoilt, args))
    apart = np.ones((2, 5), bool)
    apart[1, 2] = False
    np.testing.assert_array_equal(got[apart], want[apart])
    assert np.isnan(got[1, 2]).all()


@needs_cuda_plugin
@pytest.mark.parametrize(
    "arguments",
    [
        ("8x2048x768x24", "bfloat16"),
        pytest.param(("1x50x1536x3", "float32"), marks=slow),
        pytest.param(("3x7x96x34", "float16"), marks=slow),
    ],
)
def test_compiles_into_registers(arguments):
    """The interpreter takes what the compiler refuses."""
    shared, spilled = assembled("attn_residual", *arguments)
    assert spilled == [0] and not any(shared)
