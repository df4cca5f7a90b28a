"""Every implementation of the selective scan against the sequential float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels import selective_scan as op
from seqmodels.kernels.arrays import zero_padding
from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.selective_scan import kept, selective_scan, xla
from seqmodels.kernels.tuning import UNROLLED
from tests.kernels.helpers import (
    assert_close,
    assert_finite,
    compiled,
    documents,
    expected,
    in_two_calls,
    poisoned,
    serving,
    stacked,
    value_and_gradients,
)
from tests.kernels.inputs import selective_scan_inputs as inputs

SERVING = serving(op, shape=(1, 1, 1, 1, 1), dtype=np.dtype("float32"))
BACKENDS = [name for name in SERVING if name != "reference"]
TIME = ("u", "dt", "B", "C", "z", "weights")  # arrays with a time axis


CASES = {
    "plain": (dict(), {}),
    "no group axis": (dict(groups=0), {}),
    "read": (dict(groups=3), {}),
    "one token": (dict(length=1), {}),
    "a few tokens": (dict(length=5, groups=3), dict(packed=True, padded=True)),
    "several chunks": (
        dict(length=131, width=3, state=2, groups=2),
        dict(packed=True, padded=True),
    ),
    "packed": (dict(), dict(packed=True, padded=False)),
    "padded": (dict(groups=2), dict(packed=False, padded=True)),
    "packed and padded": (dict(groups=2), dict(packed=True, padded=True)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_equals_float64_reference(implementation, case):
    shape, layout = CASES[case]
    args = inputs(**shape)
    static = documents(length=args["u"].shape[1], **layout) if layout else {}
    got = value_and_gradients(selective_scan, args, static, implementation)
    assert_close(got, expected(selective_scan, args, static), 1e-5)


@pytest.mark.parametrize("groups", [0, 3])
def test_channels_in_pieces_equal_float64_reference(monkeypatch, groups):
    """Two pieces of two channels, as large states are scanned on a CPU; without weights and with."""
    args, static = inputs(width=4, groups=groups), documents(length=inputs()["u"].shape[1], packed=True, padded=True)
    monkeypatch.setattr(xla, "NEAR", args["initial_state"].size // 2)
    assert xla._pieces(args["initial_state"].mT) == 2
    got = value_and_gradients(selective_scan, args, static, "xla")
    assert_close(got, expected(selective_scan, args, static), 1e-5)


def read_of_kept_states(u, dt, A, B, C, *, D, z, weights, implementation, initial_state, dt_bias, **documents):
    """As `selective_scan` of two groups: each scanned alone, its states kept for two queries, and the last one read."""
    readouts, last = [], []
    for g in range(2):
        assert kept.worth(u[:, :, g], A[g])
        arrays = dict(u=u[:, :, g], dt=dt[:, :, g], A=A[g], B=B[:, :, g], dt_bias=dt_bias[g])
        states = kept.keep(**arrays, initial_state=initial_state[:, g], queries=3, **documents)
        # two queries that add up to this group's, and one that nobody reads
        readouts.append(kept.read(states, 0, 3 * C[:, :, g]) + kept.read(states, 1, -2 * C[:, :, g]))
        last.append(states.last)
    y = readouts[0] + weights[:, :, 0] * readouts[1] + D * u[:, :, 0]
    return zero_padding(y * jax.nn.silu(z), documents.get("mask")), jnp.stack(last, axis=1)


@pytest.mark.parametrize("layout", [{}, dict(packed=True, padded=True)], ids=["plain", "packed and padded"])
def test_kept_states_equal_float64_reference(layout):
    args = inputs(groups=2, length=11)
    static = documents(length=11, **layout) if layout else {}
    got = value_and_gradients(read_of_kept_states, args, static, "xla")
    assert_close(got, expected(selective_scan, args, static), 1e-5)


def test_states_are_kept_where_they_are_small(monkeypatch):
    """At most so many bytes a call, and not for a few tokens."""
    args = inputs(groups=0, length=UNROLLED + 1)
    u, A = args["u"], args["A"]
    size = u.size * A.shape[1] * 4
    for most, worth in ((size, True), (size - 1, False)):
        monkeypatch.setattr(kept, "MOST", most)
        assert kept.worth(u, A) == worth
    assert not kept.worth(u[:, :UNROLLED], A)


@pytest.mark.parametrize("case", [case for case, (shape, _) in CASES.items() if shape.get("length", 9) > UNROLLED])
def test_associative_chunks_equal_float64_reference(monkeypatch, case):
    """Chunks as they are run on accelerators, on the platform at hand."""
    monkeypatch.setattr(xla, "_by_platform", lambda sequential, associative, *a: associative(*a))
    shape, layout = CASES[case]
    args = inputs(**shape)
    static = documents(length=args["u"].shape[1], **layout) if layout else {}
    got = value_and_gradients(selective_scan, args, static, "xla", patched="associative")
    assert_close(got, expected(selective_scan, args, static), 1e-5)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_bfloat16(implementation):
    args = inputs(groups=2, length=40)
    low = ("u", "dt", "B", "C", "z", "weights")
    half = {k: jnp.asarray(v, jnp.bfloat16 if k in low else jnp.float32) for k, v in args.items()}
    y, state = compiled(selective_scan, implementation)(**half)
    same = {k: v.astype(jnp.float32) for k, v in half.items()}  # the same rounded inputs
    want, want_state = compiled(selective_scan, "reference")(**same)
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=3e-2, atol=5e-2)  # mamba-ssm's own test
    np.testing.assert_allclose(state, want_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("cut", [1, 4, 8])
def test_state_carries_over(implementation, cut):
    args, static, scan = inputs(groups=2), documents(), compiled(selective_scan, implementation)
    whole, whole_state = scan(**args, **static)
    y, state = in_two_calls(scan, args, static, cut, TIME)
    mask = static["mask"][..., None]
    assert_close((jnp.where(mask, y, 0), state), (jnp.where(mask, whole, 0), whole_state), 1e-6)


@pytest.mark.parametrize("implementation", SERVING)
def test_poisoned_padding_never_leaks(implementation):
    args, static = inputs(groups=2), documents()
    hidden = poisoned(args, static["mask"], ("u", "dt", "B", "C", "z"))
    got = value_and_gradients(selective_scan, hidden, static, implementation)
    assert_close(got, value_and_gradients(selective_scan, args, static, implementation), 1e-7)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_extreme_decays_are_finite(implementation, scale):
    args = inputs(groups=2)
    args["A"] = args["A"] * np.float32(scale)
    got = value_and_gradients(selective_scan, args, documents(padded=False), implementation)
    assert_finite(got)
    assert_close(got[0], expected(selective_scan, args, documents(padded=False))[0], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", BACKENDS)
def test_vmap(implementation):
    args = [inputs(seed=s) for s in (0, 1)]

    def run(args):
        return value_and_gradients(selective_scan, args, {}, implementation)

    assert_close(jax.vmap(run)(stacked(args)), stacked([run(a) for a in args]), 1e-5)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_memory_grows_with_chunks_not_tokens(implementation, groups):
    """What the gradient of a long scan, or of READ's, needs a token is a fraction of one state a token."""
    width, state = 128, 64  # a GPU kernel takes 128 channels at once

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
    one, few, odd, more = ((2, length, 1, 64, n) for length, n in ((1, 16), (UNROLLED, 16), (2, 9), (UNROLLED + 1, 9)))
    for shape, name in ((one, "xla"), (few, "mosaic_gpu"), (odd, "xla"), (more, "mosaic_gpu")):
        assert op.choose("cuda", shape, dtype=gpu["dtype"])[0] == name
        assert op.mosaic_gpu.supports(**gpu, shape=shape, named=True) is None
    assert "N is 9" in op.choose("cuda", odd, dtype=gpu["dtype"])[1]
    assert "not a multiple of 512" in op.mosaic_gpu.few.supports((1, 1, 1, 30, 16))
    assert "2^31" in op.mosaic_gpu.few.supports((2**15, 1, 1, 4096, 16))
