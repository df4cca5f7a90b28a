"""Every implementation of the linear scan against the float64 reference, and that against a filter of SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import lfilter

from seqmodels.kernels import linear_scan as op
from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.linear_scan import linear_scan, xla
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
from tests.kernels.inputs import extreme_decays
from tests.kernels.inputs import linear_scan_inputs as inputs

SERVING = serving(op, shape=(1, 1, 1), dtype=np.dtype("float32"), accumulator=np.dtype("float32"))
BACKENDS = [name for name in SERVING if name != "reference"]
TIME = ("log_decay", "x")  # arrays with a time axis
REVERSE = dict(reverse=True)
fast = pytest.mark.parametrize("implementation", BACKENDS)

BOTH = dict(packed=True, padded=True)
CASES = {
    "plain": (dict(), {}, {}),
    "reverse": (dict(), {}, REVERSE),
    "several axes of channels": (dict(width=(3, 2)), BOTH, {}),
    "one token": (dict(length=1), {}, {}),
    "a few tokens": (dict(length=5), BOTH, {}),
    "a few tokens, reverse": (dict(length=5), BOTH, REVERSE),
    "packed": (dict(), dict(packed=True, padded=False), {}),
    "padded": (dict(length=37), dict(packed=False, padded=True), REVERSE),
    "packed and padded": (dict(length=70), BOTH, {}),
    "packed and padded, reverse": (dict(length=70), BOTH, REVERSE),
}
LONG = [case for case, (shape, *_) in CASES.items() if shape.get("length", 11) > xla.UNROLLED]


@pytest.fixture
def several_chunks(monkeypatch):
    """Chunks as they are run on accelerators, on the platform at hand."""
    monkeypatch.setattr(xla, "_by_platform", lambda whole, several, *arrays: several(*arrays))


def check(case, implementation, patched=""):
    shape, layout, options = CASES[case]
    static = documents(length=shape.get("length", 11), **layout) if layout else {}
    args = inputs(**shape)
    got = value_and_gradients(linear_scan, args, static, implementation, options, patched)
    assert_close(got, expected(linear_scan, args, static, options), 1e-5)


@pytest.mark.parametrize("case", CASES)
@fast
def test_equals_float64_reference(implementation, case):
    check(case, implementation)


@pytest.mark.parametrize("case", LONG)
def test_several_chunks_equal_float64_reference(several_chunks, case):
    check(case, "xla", patched="several chunks")


@pytest.mark.parametrize("length", [9, 256, 1000, 65_536])
def test_walks_take_few_steps(length):
    """Two walks over a chunk and one over the chunks."""
    size = xla.chunk_size(length)
    assert 1 < size < length and 2 * size + -(-length // size) < 4 * length**0.5


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_reference_equals_scipys_filter(dtype):
    """Of one pole, y_t = pole y_{t-1} + x_t, from a state; in both directions."""
    args = inputs(batch=1, length=40, width=1, dtype=dtype)
    pole = np.exp(args["log_decay"][0, 0, 0])
    args["log_decay"] = np.broadcast_to(args["log_decay"][:, :1], args["log_decay"].shape)
    for reverse in (False, True):
        with jax.enable_x64(True):
            h, state = jax.tree.map(np.asarray, compiled(linear_scan, "reference", reverse=reverse)(**args))
        x = args["x"][0, ::-1, 0] if reverse else args["x"][0, :, 0]
        want, last = lfilter([1], [1, -pole], x, zi=pole * args["initial_state"][0])
        got = h[0, ::-1, 0] if reverse else h[0, :, 0]
        np.testing.assert_allclose(got, want, rtol=1e-12)
        np.testing.assert_allclose(pole * state[0], last, rtol=1e-12)


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("real_decay", [False, True])
def test_complex_numbers(chunks, real_decay, request):
    """Values, and gradients as jax takes them through the reference."""
    if chunks:
        request.getfixturevalue("several_chunks")
    args, static = inputs(length=21, dtype=np.complex64), documents(length=21)
    if real_decay:
        args["log_decay"] = args["log_decay"].real
    (h, state), gradients = got = value_and_gradients(linear_scan, args, static, "xla", patched=str(chunks))
    assert h.dtype == state.dtype == gradients["x"].dtype == jnp.complex64
    assert gradients["log_decay"].dtype == args["log_decay"].dtype
    assert_close(
        jax.tree.map(lambda x: (x.real, x.imag), got),
        jax.tree.map(
            lambda x: (x.real, x.imag), value_and_gradients(linear_scan, args, static, "reference", patched="")
        ),
        1e-5,
    )


@fast
def test_bfloat16(implementation):
    args = inputs(length=80)
    half = {k: jnp.asarray(v, jnp.bfloat16 if k == "x" else jnp.float32) for k, v in args.items()}
    (h, state), gradients = value_and_gradients(linear_scan, half, {}, implementation)
    (want, want_state), want_gradients = expected(linear_scan, half, {})
    assert h.dtype == gradients["x"].dtype == jnp.bfloat16
    assert state.dtype == gradients["log_decay"].dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(h, np.float32), want, rtol=2**-8, atol=1e-6)  # rounded once
    assert_close(state, want_state, 1e-6)
    assert_close(gradients, want_gradients, 5e-3)


@fast
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cut", [1, 4, 10])
def test_state_carries_over(implementation, cut, reverse):
    """In reverse, the later piece comes first."""
    args, static, scan = inputs(), documents(length=11), compiled(linear_scan, implementation, reverse=reverse)
    if reverse:
        static = dict(mask=static["mask"])
    whole, whole_state = scan(**args, **static)
    if reverse:
        given = args | static
        tail = {n: x[:, cut:] if n != "initial_state" else x for n, x in given.items()}
        later, state = scan(**tail)
        head = {n: x[:, :cut] for n, x in given.items() if n != "initial_state"}
        earlier, state = scan(**head, initial_state=state)
        h = jnp.concatenate([earlier, later], axis=1)
    else:
        h, state = in_two_calls(scan, args, static, cut, TIME)
    assert_close((h, state), (whole, whole_state), 1e-6)


@pytest.mark.parametrize("implementation", SERVING)
def test_poisoned_padding_never_leaks(implementation):
    args, static = inputs(), documents(length=11)
    hidden = poisoned(args, static["mask"], TIME)
    got = value_and_gradients(linear_scan, hidden, static, implementation)
    assert_close(got, value_and_gradients(linear_scan, args, static, implementation), 1e-7)
    assert not got[0][0][~static["mask"]].any()


@fast
def test_extreme_decays_are_finite(implementation):
    """None, all gone at once, and in between; also the logarithm of zero."""
    args = inputs(length=40)
    args["log_decay"] = extreme_decays(args["log_decay"].shape)
    args["log_decay"][:, 7:9] = -np.inf
    static = documents(length=40, padded=False)
    got = value_and_gradients(linear_scan, args, static, implementation)
    assert_finite(got)
    assert_close(got, expected(linear_scan, args, static), 1e-5)


@pytest.mark.slow
@fast
def test_vmap(implementation):
    args = [inputs(seed=s) for s in (0, 1)]

    def run(args):
        return value_and_gradients(linear_scan, args, {}, implementation)

    assert_close(jax.vmap(run)(stacked(args)), stacked([run(a) for a in args]), 1e-5)


def test_a_donated_state_is_updated_in_place():
    args = inputs(length=1, width=64)
    state = args.pop("initial_state")
    step = jax.jit(lambda state, args: linear_scan(**args, initial_state=state), donate_argnums=0)
    memory = step.lower(state, args).compile().memory_analysis()
    assert memory.alias_size_in_bytes == state.nbytes > memory.temp_size_in_bytes


def test_unknown_implementation_is_named():
    with pytest.raises(UnsupportedError, match=r"'cuda'.*reference, xla"):
        linear_scan(**inputs(), implementation="cuda")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(x=np.zeros((2, 11), np.float32)), r"x has shape \(2, 11\)"),
        (inputs(length=0), "T is 0"),
        (dict(log_decay=np.zeros((2, 11, 1), np.float32)), r"log_decay has shape \(2, 11, 1\)"),
        (dict(log_decay=np.zeros((2, 11, 5), np.complex64)), "log_decay is complex64 and x float32"),
        (dict(initial_state=np.zeros((2, 4), np.float32)), "initial_state has shape"),
        (dict(mask=np.ones((2, 10), bool)), "mask has shape"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        linear_scan(**inputs() | changed)
