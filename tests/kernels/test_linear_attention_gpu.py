"""The GPU kernels of linear attention: their numbers in Pallas's GPU interpreter, their compilation ahead of time.

The interpreter multiplies by jax.numpy what the tensor cores multiply, everything else it runs as it stands. Arrays are
bfloat16, as are the factors of every product; the reference has the same numbers in float64. On a machine with such a
GPU the same tests run the kernels themselves:

    JAX_PLATFORMS=cuda XLA_FLAGS= python -m pytest -n 0 tests/kernels/test_linear_attention_gpu.py -k "not compile"
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.interpreter import interpret
from seqmodels.kernels.linear_attention import linear_attention, mosaic_gpu
from tests.kernels.helpers import (
    SHARED_MEMORY,
    assembled,
    compiled,
    documents,
    expected,
    needs_cuda_plugin,
    poisoned,
    random_documents,
    value_and_gradients,
)
from tests.kernels.inputs import linear_attention_inputs as inputs
from tests.kernels.isolation import check_isolation

ROUNDINGS = 4 * 2**-9  # of a decayed value, a score or state made of such, its gradient's likewise, and the result
LEAST = 1e-37  # no number of float32 is nearer to 0

run = functools.partial(value_and_gradients, linear_attention, implementation="mosaic_gpu")


@pytest.fixture
def interpreter(request):
    """Kernels run in the interpreter; or on the GPU, if there is one."""
    if jax.default_backend() != "gpu":
        request.getfixturevalue("gpu_interpreter")


def halved(args, dtype=jnp.bfloat16):
    return {k: jnp.asarray(v, dtype if k in "qkv" else jnp.float32) for k, v in args.items()}


def assert_near(got, want, tolerance=ROUNDINGS, least=LEAST):
    """Every array near in the sense of norms."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.isfinite(x).all(), path
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y) + least, path


def rounding_of_decay_gradients(args, gradients):
    """What float32 leaves open in the gradients of log decays, which are differences of sums of q . dq and k . dk.

    Where all decays are nearly zero, so are these gradients, but not the sums: each token's own term is in both.
    """
    terms = (np.sum(np.asarray(args[n], np.float64) * np.asarray(gradients[n]), axis=-1) for n in "qk")
    return 2**-24 * sum(np.abs(x).sum() for x in terms)


EXCLUSIVE = dict(read="exclusive", scale=0.7)
CASES = {
    "packed and padded": (dict(length=90, groups=1, heads=2, keys=40, values=72), {}),
    "exclusive with bonus": (dict(length=70, bonus=True), EXCLUSIVE),
    "extreme decays": (dict(length=70, rate=1e4, batch=1, groups=1, heads=2), {}),
}
SLOW = {
    "states of 320 rows": (dict(length=70, batch=1, groups=1, heads=1, keys=320, decay="constant", rate=0.05), {}),
    "no decay": (dict(length=65, batch=1, decay="none"), dict(scale=-0.7)),
    "stretches of time": (dict(length=1030, batch=1, groups=1, heads=1, rate=0.01), {}),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW)])
def test_equals_float64_reference(interpreter, case):
    shape, options = (CASES | SLOW)[case]
    args, static = halved(inputs(**shape)), documents(batch=shape.get("batch", 2), length=shape["length"])
    assert_near(run(args, static, options=options), expected(linear_attention, args, static, options))


@pytest.mark.slow
def test_random_documents(interpreter):
    """Any change of documents, any mask, any decays, at one shape."""
    length, heads = 70, 2

    @settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(0, 2**16), changes=st.floats(0, 1), real=st.floats(0, 1), first=st.integers(0, 2))
    def check(seed, changes, real, first):
        rate = 10 ** np.random.default_rng(seed).uniform(-3, 3)
        args = halved(inputs(batch=1, length=length, groups=1, heads=heads, rate=rate, seed=seed))
        static = random_documents(seed, 1, length, changes, real, first)
        (results, gradients), (want, want_gradients) = run(args, static), expected(linear_attention, args, static)
        least = rounding_of_decay_gradients(args, want_gradients)
        assert_near(gradients.pop("log_decay"), want_gradients.pop("log_decay"), least=least)
        assert_near((results, gradients), (want, want_gradients))

    check()


@pytest.mark.parametrize("length", [70, pytest.param(1030, marks=pytest.mark.slow)])
def test_isolation(interpreter, length):
    """What is not finite in one document, in padding or in a dropped state reaches no other; also between stretches."""
    operation = functools.partial(linear_attention, implementation="mosaic_gpu")
    check_isolation(
        operation, halved(inputs(length=length, groups=1, heads=2)), ("q", "k", "v", "log_decay"), ROUNDINGS
    )


def test_deterministic(interpreter):
    """Bit for bit, the gradients that heads add up to among them."""
    args, static = halved(inputs(length=70, batch=1)), documents(batch=1, length=70)
    assert_near(*(run(args, static) for _ in range(2)), tolerance=0)


@pytest.mark.slow
def test_normalised(interpreter):
    """A quotient's gradient is a difference that rounding shows in: no more of it than in XLA's own products."""
    args, static = halved(inputs(length=70, batch=1, normalise=True)), documents(batch=1, length=70)
    options = dict(normalise=True)
    want = expected(linear_attention, args, static, options)
    got, other = (value_and_gradients(linear_attention, args, static, name, options) for name in ("mosaic_gpu", "xla"))
    for x, y, truth in zip(*map(jax.tree.leaves, (got, other, want)), strict=True):
        error, allowed = (np.linalg.norm(np.asarray(z, np.float64) - np.asarray(truth)) for z in (x, y))
        assert error <= 1.5 * allowed


def test_float16(interpreter):
    """Also where states are beyond its range."""
    args = inputs(length=70, batch=1, groups=1, heads=1, decay="none")
    args = halved(args | dict(initial_state=args["initial_state"] * 1e6, q=args["q"] * 1e-3), jnp.float16)
    y, state = compiled(linear_attention, "mosaic_gpu")(**args)
    assert y.dtype == jnp.float16 and state.dtype == jnp.float32
    want = compiled(linear_attention, "reference")(**args)
    assert_near((y, state), want)


def test_poisoned_padding_never_leaks(interpreter):
    args, static = halved(inputs(length=70, batch=1)), documents(batch=1, length=70)
    assert_near(run(poisoned(args, static["mask"], ("q", "k", "v")), static), run(args, static), 0)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the interpreter finds races, the GPU does not")
def test_no_races(interpreter, capsys):
    """No warpgroup reads or writes what a copy may be writing or reading; each kernel's races are printed."""
    args = halved(inputs(length=200, batch=1, groups=1, heads=1))
    with interpret(detect_races=True):
        jax.block_until_ready(run(args, {}))
    assert "RACE" not in capsys.readouterr().out


def test_traced_once_a_shape(monkeypatch):
    """Layers of one shape share their kernels: forward, states, gradient of values and states, of queries and keys."""
    kernel, traced = plgpu.kernel, []
    monkeypatch.setattr(plgpu, "kernel", lambda *args, **options: traced.append(1) or kernel(*args, **options))
    args = halved(inputs(length=64, batch=3, groups=1, heads=1))  # a shape that no other test has traced
    names = ("log_decay", "bonus", "initial_state", "segment_ids", "initial_segment", "mask")
    arrays = args | {name: args.get(name) for name in names}
    options = dict(scale=1.0, read="inclusive", chunk=None, dtype=jnp.bfloat16)

    def layers(v):
        for _ in range(3):
            v, _ = mosaic_gpu.linear_attention(**arrays | dict(v=v), **options)
        return jnp.sum(v, dtype=jnp.float32)

    jax.eval_shape(jax.grad(layers), args["v"])
    assert len(traced) == 4


def test_reasons():
    facts = dict(shape=(1, 64, 1, 1, 64, 64), dtype=np.dtype("float16"), decay="head")
    assert "needs an NVIDIA GPU" in mosaic_gpu.supports(platform="cpu", **facts)
    if jax.default_backend() != "gpu":
        assert mosaic_gpu.supports(platform="cuda", **facts) is None
        with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU"):
            linear_attention(**inputs(), implementation="mosaic_gpu")
    assert "float32" in mosaic_gpu.supports(platform="cuda", **facts | dict(dtype=np.dtype("float32")))
    assert "log_decay is [B, T, H, K]" in mosaic_gpu.supports(platform="cuda", **facts | dict(decay="channel"))
    assert "T is 8" in mosaic_gpu.supports(platform="cuda", **facts | dict(shape=(1, 8, 1, 1, 64, 64)))
    assert "65535" in mosaic_gpu.supports(platform="cuda", **facts | dict(shape=(2**16, 64, 1, 1, 64, 64)))


# shape, dtype, decay, documents, read. The first ones are those that models train with.
MAIN = [
    ("8x2048x1x32x128x64", "bfloat16", "head", 0, "inclusive"),
    ("1x65536x1x32x128x64", "bfloat16", "head", 1, "inclusive"),
]
ODD = [
    ("8x2048x4x4x256x512", "bfloat16", "constant", 0, "inclusive"),
    ("2x2048x2x2x384x1536", "bfloat16", "constant", 1, "inclusive"),
    ("2x100x1x2x24x65", "float16", "none", 1, "exclusive"),
]


@needs_cuda_plugin
@pytest.mark.parametrize("case", [MAIN[0], *(pytest.param(c, marks=pytest.mark.slow) for c in MAIN[1:])])
def test_compiles_without_spills(case):
    shared, spilled = assembled("linear_attention", *case)
    assert len(spilled) >= 4 and not any(spilled)
    assert max(shared, default=0) <= SHARED_MEMORY


@needs_cuda_plugin
@pytest.mark.slow
@pytest.mark.parametrize("case", ODD)
def test_odd_shapes_compile(case):
    """The interpreter takes what the compiler refuses."""
    shared, spilled = assembled("linear_attention", *case)
    assert len(spilled) >= 4
    assert max(shared, default=0) <= SHARED_MEMORY
