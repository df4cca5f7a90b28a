"""Every implementation of the selective scan against the sequential float64 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels import selective_scan as op
from seqmodels.kernels.dispatch import UnsupportedError, lowered_name
from seqmodels.kernels.selective_scan import selective_scan, xla

FACTS = dict(platform=lowered_name(jax.default_backend()), shape=(1, 1, 1, 1, 1), dtype=np.dtype("float32"), named=True)
SERVING = [name for name, backend in op.BACKENDS.items() if backend.supports(**FACTS) is None]
BACKENDS = [name for name in SERVING if name != "reference"]


def inputs(batch=2, length=9, groups=1, width=5, state=4, seed=0, dtype=np.float32):
    """Random arguments, every optional one given; groups == 0 leaves the group axis out."""
    draw = np.random.default_rng(seed)
    group = (groups,) if groups else ()
    args = dict(
        u=draw.normal(size=(batch, length, *group, width)),
        dt=draw.normal(size=(batch, length, *group, width)),
        A=-np.exp(draw.normal(size=(*group, width, state))),
        B=draw.normal(size=(batch, length, *group, state)),
        C=draw.normal(size=(batch, length, *group, state)),
        D=draw.normal(size=width),
        z=draw.normal(size=(batch, length, width)),
        dt_bias=draw.normal(size=(*group, width)) * 0.3,
        initial_state=draw.normal(size=(batch, *group, width, state)),
    )
    if groups > 1:
        args["weights"] = draw.normal(size=(batch, length, groups - 1, width))
    return {name: np.asarray(value, dtype) for name, value in args.items()}


def documents(batch=2, length=9, seed=0, packed=True, padded=True):
    draw = np.random.default_rng(seed + 100)
    out = {}
    if packed:
        out["segment_ids"] = jnp.asarray(np.cumsum(draw.random((batch, length)) < 0.25, axis=1), jnp.int32)
        out["initial_segment"] = jnp.zeros(batch, jnp.int32)
    if padded:
        out["mask"] = jnp.asarray(draw.random((batch, length)) < 0.7)
    return out


def value_and_gradients(args, static, implementation, seed=7):
    """y on real tokens, final state, and the gradients of a random functional of both."""
    mask = static.get("mask")

    def outputs(args):
        y, state = selective_scan(**args, **static, implementation=implementation)
        return (y if mask is None else jnp.where(mask[..., None], y, 0)), state

    def functional(args):
        draw = np.random.default_rng(seed)
        return sum(jnp.sum(x * jnp.asarray(draw.normal(size=x.shape), x.dtype)) for x in outputs(args))

    return jax.jit(outputs)(args), jax.jit(jax.grad(functional))(args)


def assert_close(ours, reference, tolerance):
    """Relative error of each array in the Frobenius norm."""
    for (path, x), want in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(reference), strict=True):
        x, want = np.asarray(x, np.float64), np.asarray(want, np.float64)
        error = np.linalg.norm(x - want) / max(np.linalg.norm(want), 1e-30)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.2e}"


CASES = {
    "plain": (dict(), {}),
    "no group axis": (dict(groups=0), {}),
    "read": (dict(groups=3), {}),
    "one token": (dict(length=1), {}),
    "a few tokens": (dict(length=5, groups=3), dict(packed=True, padded=True)),
    "several chunks": (dict(length=2 * xla.CHUNK + 3, width=3, state=2, groups=2), dict(packed=True, padded=True)),
    "packed": (dict(), dict(packed=True, padded=False)),
    "padded": (dict(groups=2), dict(packed=False, padded=True)),
    "packed and padded": (dict(groups=2), dict(packed=True, padded=True)),
}


@pytest.fixture
def chunked(monkeypatch, request):
    """Both ways to run a chunk, on the platform at hand."""
    if request.param == "associative":
        monkeypatch.setattr(xla, "_by_platform", lambda sequential, associative, *a: associative(*a))
    return request.param


@pytest.mark.parametrize("chunked", ["sequential", "associative"], indirect=True)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_equals_float64_reference(implementation, case, chunked):
    shape, layout = CASES[case]
    args = inputs(**shape)
    static = documents(length=args["u"].shape[1], **layout) if layout else {}
    with jax.enable_x64(True):
        want = value_and_gradients(inputs(**shape, dtype=np.float64), static, "reference")
    got = value_and_gradients(args, static, implementation)
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_bfloat16(implementation):
    args = inputs(groups=2, length=40)
    low = ("u", "dt", "B", "C", "z", "weights")
    half = {k: jnp.asarray(v, jnp.bfloat16 if k in low else jnp.float32) for k, v in args.items()}
    y, state = selective_scan(**half, implementation=implementation)
    want, want_state = selective_scan(
        **{k: v.astype(jnp.float32) for k, v in half.items()}, implementation="reference"
    )  # the same rounded inputs
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=3e-2, atol=5e-2)  # mamba-ssm's own test
    np.testing.assert_allclose(state, want_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("cut", [1, 4, 8])
def test_state_carries_over(implementation, cut):
    args, static = inputs(groups=2), documents()
    whole, whole_state = selective_scan(**args, **static, implementation=implementation)
    time = ("u", "dt", "B", "C", "z", "weights", "segment_ids", "mask")
    both = {**args, **static}
    head = {k: v[:, :cut] if k in time else v for k, v in both.items()}
    tail = {k: v[:, cut:] if k in time else v for k, v in both.items()}
    first, state = selective_scan(**head, implementation=implementation)
    last_real = [row[:cut][mask[:cut]] for row, mask in zip(static["segment_ids"], static["mask"], strict=True)]
    tail["initial_state"] = state
    tail["initial_segment"] = jnp.asarray([row[-1] if row.size else 0 for row in last_real], jnp.int32)
    second, state = selective_scan(**tail, implementation=implementation)
    y = jnp.concatenate([first, second], axis=1)
    mask = static["mask"][..., None]
    assert_close((jnp.where(mask, y, 0), state), (jnp.where(mask, whole, 0), whole_state), 1e-6)


@pytest.mark.parametrize("implementation", SERVING)
def test_poisoned_padding_never_leaks(implementation):
    args, static = inputs(groups=2), documents()
    mask = static["mask"]
    time = ("u", "dt", "B", "C", "z")
    poisoned = {
        k: jnp.where(mask.reshape(*mask.shape, *[1] * (v.ndim - 2)), v, jnp.nan) if k in time else v
        for k, v in args.items()
    }
    got = value_and_gradients(poisoned, static, implementation)
    want = value_and_gradients(args, static, implementation)
    assert_close(got, want, 1e-7)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_extreme_decays_are_finite(implementation, scale):
    args = inputs(groups=2)
    args["A"] = args["A"] * scale
    got = value_and_gradients(args, documents(padded=False), implementation)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    with jax.enable_x64(True):
        args64 = inputs(groups=2, dtype=np.float64)
        args64["A"] = args64["A"] * scale
        want = value_and_gradients(args64, documents(padded=False), "reference")
    assert_close(got[0], want[0], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", BACKENDS)
def test_vmap(implementation):
    args = [inputs(seed=s) for s in (0, 1)]
    f = functools.partial(value_and_gradients, static={}, implementation=implementation)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *args)
    want = jax.tree.map(lambda *x: jnp.stack(x), *(f(a) for a in args))
    assert_close(jax.vmap(f)(stacked), want, 1e-5)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_memory_grows_with_chunks_not_tokens(implementation, groups):
    """What the gradient of a long scan, or of READ's, needs a token is a fraction of one state a token."""
    width, state = 32, 64

    def temporary(length):
        args = inputs(batch=1, length=length, groups=groups, width=width, state=state)
        f = jax.jit(jax.grad(lambda args: jnp.sum(selective_scan(**args, implementation=implementation)[0])))
        return f.lower(args).compile().memory_analysis().temp_size_in_bytes

    bytes_per_token = (temporary(4096) - temporary(1024)) / 3072
    assert bytes_per_token < groups * width * state * 4 / 2, bytes_per_token


def test_unknown_implementation_is_named():
    with pytest.raises(UnsupportedError, match=r"'cuda'.*reference, xla"):
        selective_scan(**inputs(), implementation="cuda")


def test_wrong_shape_is_named():
    args = inputs()
    args["B"] = args["B"][..., :-1]
    with pytest.raises(ValueError, match="B has shape"):
        selective_scan(**args)
    with pytest.raises(ValueError, match="T is 0"):
        selective_scan(**inputs(length=0))


def test_a_donated_state_is_updated_in_place():
    args = inputs(length=1, groups=2, width=64, state=16)
    state = args.pop("initial_state")
    step = jax.jit(lambda state, args: selective_scan(**args, initial_state=state), donate_argnums=0)
    memory = step.lower(state, args).compile().memory_analysis()
    assert memory.alias_size_in_bytes == state.nbytes > memory.temp_size_in_bytes


def test_few_tokens_have_a_kernel_of_their_own_or_xla():
    """Chunks serve those that are asked for by name."""
    gpu = dict(platform="cuda", dtype=np.dtype("float32"))
    one, few, odd, more = ((2, length, 1, 64, n) for length, n in ((1, 16), (xla.FEW, 16), (2, 9), (xla.FEW + 1, 9)))
    for shape, name in ((one, "xla"), (few, "mosaic_gpu"), (odd, "xla"), (more, "mosaic_gpu")):
        assert op.choose("cuda", shape, dtype=gpu["dtype"])[0] == name
        assert op.mosaic_gpu.supports(**gpu, shape=shape, named=True) is None
    assert "N is 9" in op.choose("cuda", odd, dtype=gpu["dtype"])[1]
    assert "not a multiple of 512" in op.mosaic_gpu.few.supports((1, 1, 1, 30, 16))
    assert "2^31" in op.mosaic_gpu.few.supports((2**15, 1, 1, 4096, 16))
