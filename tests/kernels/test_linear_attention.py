"""Every implementation of linear attention against the sequential float64 reference."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels import linear_attention as op
from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.linear_attention import linear_attention, xla
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
from tests.kernels.inputs import linear_attention_inputs as inputs

FACTS = dict(
    shape=(1, 1, 1, 1, 1, 1), dtype=np.dtype("float32"), decay="head", read="inclusive", bonus=False, chunk=None
)
SERVING = serving(op, **FACTS)
BACKENDS = [name for name in SERVING if name != "reference"]
TIME = ("q", "k", "v", "log_decay")  # arrays with a time axis


def against_reference(implementation, args, static, options=None, tolerance=1e-5):
    """Value and gradients in float32, within `tolerance` of the float64 reference."""
    got = value_and_gradients(linear_attention, args, static, implementation, options)
    assert_finite(got)
    assert_close(got, expected(linear_attention, args, static, options), tolerance)


# shape, documents, options
EXCLUSIVE, NORMALISED = dict(read="exclusive"), dict(normalise=True)
BOTH, LONG = dict(packed=True, padded=True), dict(length=xla.CHUNK + 9, keys=2, values=3)
CASES = {
    "no decay, normalised": (dict(decay="none", normalise=True), BOTH, NORMALISED),
    "constant": (dict(decay="constant"), {}, EXCLUSIVE),
    "constant, padded": (dict(decay="constant"), dict(packed=False, padded=True), dict(scale=0.7)),
    "head, one group": (dict(groups=1), dict(packed=True, padded=False), dict(scale=0.7)),
    "head, exclusive with bonus": (dict(groups=4, bonus=True), BOTH, EXCLUSIVE | dict(scale=0.7)),
    "head, several chunks": (LONG, BOTH, {}),
    "head, short chunks": (dict(), BOTH, dict(chunk=4)),
    "channel, exclusive with bonus": (
        dict(decay="channel", length=35, bonus=True),
        BOTH,
        EXCLUSIVE | dict(scale=0.7),
    ),
    "channel, several chunks": (LONG | dict(decay="channel", normalise=True), BOTH, NORMALISED),
    "one token": (dict(length=1, bonus=True), {}, EXCLUSIVE),
    "a few tokens": (dict(length=5), BOTH, dict(scale=0.7)),
    "a few tokens, exclusive": (
        dict(length=5, decay="channel", normalise=True, bonus=True),
        BOTH,
        EXCLUSIVE | NORMALISED,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_equals_float64_reference(implementation, case):
    shape, layout, options = CASES[case]
    static = documents(length=shape.get("length", 11), **layout) if layout else {}
    against_reference(implementation, inputs(**shape), static, options)


@pytest.mark.parametrize("case", [dict(decay="channel"), dict(decay="none", normalise=True)])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_bfloat16(implementation, case):
    args, options = inputs(length=80, keys=16, values=8, **case), dict(normalise="normalise" in case)
    half = {k: jnp.asarray(v, jnp.bfloat16 if k in "qkv" else jnp.float32) for k, v in args.items()}
    (y, state), gradients = got = value_and_gradients(linear_attention, half, {}, implementation, options)
    assert y.dtype == gradients["v"].dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert_close(got, expected(linear_attention, half, {}, options), 1e-2)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_float16_sums_beyond_its_range(implementation):
    args = {k: jnp.full_like(v, 100, jnp.float16) for k, v in inputs(decay="none", length=40).items() if k in "qkv"}
    y, state = compiled(linear_attention, implementation, scale=1e-6)(**args)
    np.testing.assert_allclose(state, 40 * 1e4, rtol=1e-5)
    np.testing.assert_allclose(y[:, -1], 3 * 100 * 0.4, rtol=2e-3)


@pytest.mark.parametrize("cut, normalise", [(1, False), (9, True)])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_state_carries_over(implementation, cut, normalise):
    args, static = inputs(normalise=normalise), documents(length=11)
    run = compiled(linear_attention, implementation, normalise=normalise)
    whole, whole_state = run(**args, **static)
    y, state = in_two_calls(run, args, static, cut, TIME)
    mask = static["mask"][..., None, None]
    assert_close((jnp.where(mask, y, 0), state), (jnp.where(mask, whole, 0), whole_state), 1e-6)


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_documents_are_apart(implementation, decay):
    """A packed row equals its documents one by one."""
    args = inputs(batch=1, length=24, decay=decay)
    start = args.pop("initial_state")
    run, bounds = compiled(linear_attention, implementation), [0, 3, 12, 15, 24]
    ids = np.repeat([5, 2, 9, 2], np.diff(bounds))[None].astype(np.int32)
    y, state = run(**args, initial_state=start, segment_ids=ids)
    for first, (begin, end) in enumerate(itertools.pairwise(bounds)):
        own = {name: x[:, begin:end] for name, x in args.items()}
        alone, alone_state = run(**own, initial_state=np.zeros_like(start) if first else start)
        assert_close(y[:, begin:end], alone, 1e-6)
    assert_close(state, alone_state, 1e-6)


@pytest.mark.parametrize("sides", [(5, 0), (0, 5), (2, 3)])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_padding_on_any_side_changes_nothing(implementation, sides):
    args, run = inputs(length=10), compiled(linear_attention, implementation)
    want, want_state = run(**args)

    def pad(x, fill):
        return np.pad(x, [(0, 0), sides] + [(0, 0)] * (x.ndim - 2), constant_values=fill)

    padded = {k: pad(v, np.nan) if k in TIME else v for k, v in args.items()}
    mask = pad(np.ones((2, 10), bool), False)
    y, state = run(**padded, mask=mask)
    assert np.isfinite(y).all()
    assert_close((y[:, sides[0] : sides[0] + 10], state), (want, want_state), 1e-6)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_poisoned_padding_never_leaks(implementation):
    args, static = inputs(bonus=True), documents(length=11)
    hidden = poisoned(args, static["mask"], TIME)
    got = value_and_gradients(linear_attention, hidden, static, implementation, EXCLUSIVE)
    assert_close(got, value_and_gradients(linear_attention, args, static, implementation, EXCLUSIVE), 1e-7)


@pytest.mark.parametrize("decay, length", [("head", 5), ("head", 40), ("channel", 40)])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_extreme_decays(implementation, decay, length):
    """No decay, all gone at once, and what is left after tokens of both: finite, and as exact as ever."""
    args = inputs(decay=decay, length=length)
    args["log_decay"] = extreme_decays(args["log_decay"].shape)
    against_reference(implementation, args, documents(length=length))


@pytest.mark.parametrize("implementation", BACKENDS)
def test_nothing_to_read_gives_zero(implementation):
    """Without keys, and without queries, the normaliser is zero: so is y, and gradients are finite."""
    args = inputs(decay="none", normalise=True)
    del args["initial_state"]
    args["k"][:, :4] = 0
    args["q"][:, 7:] = 0
    (y, _), gradients = value_and_gradients(linear_attention, args, {}, implementation, NORMALISED)
    assert (y[:, :4] == 0).all() and (y[:, 7:] == 0).all() and (y[:, 4:7] != 0).all()
    assert all(np.isfinite(x).all() for x in gradients.values())


@pytest.mark.parametrize("implementation", BACKENDS)
def test_deterministic(implementation):
    args, static = inputs(length=40), documents(length=40)
    first, second = (value_and_gradients(linear_attention, args, static, implementation) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", BACKENDS)
def test_vmap(implementation):
    args = [inputs(seed=s, bonus=True) for s in (0, 1)]

    def run(args):
        return value_and_gradients(linear_attention, args, {}, implementation, EXCLUSIVE)

    assert_close(jax.vmap(run)(stacked(args)), stacked([run(a) for a in args]), 1e-5)


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_memory_grows_with_chunks_not_tokens(implementation, decay):
    """What the gradient of a long sequence needs a token is a fraction of one state a token."""
    heads, keys, values = 2, 32, 64

    def temporary(length):
        shape = dict(batch=1, length=length, groups=1, heads=heads, keys=keys, values=values, decay=decay)
        f = jax.jit(jax.grad(lambda args: jnp.sum(linear_attention(**args, implementation=implementation)[0])))
        return f.lower(inputs(**shape)).compile().memory_analysis().temp_size_in_bytes

    bytes_per_token = (temporary(4096) - temporary(1024)) / 3072
    state = heads * keys * values * 4
    boundaries, arrays = state / xla.CHUNK, 4 * (2 * keys + heads * (values + 2 * keys))
    assert bytes_per_token < boundaries + 5 * arrays < state / 2, bytes_per_token


def test_a_donated_state_is_updated_in_place():
    args = inputs(length=1, keys=32, values=64)
    state = args.pop("initial_state")
    step = jax.jit(lambda state, args: linear_attention(**args, initial_state=state), donate_argnums=0)
    memory = step.lower(state, args).compile().memory_analysis()
    assert memory.alias_size_in_bytes == state.nbytes > memory.temp_size_in_bytes


def test_unknown_implementation_is_named():
    with pytest.raises(UnsupportedError, match=r"'cuda'.*reference, xla"):
        linear_attention(**inputs(), implementation="cuda")


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(v=np.zeros((2, 11, 3, 5), np.float32)), "a multiple of Hk"),
        (inputs(length=0), "T is 0"),
        (dict(log_decay=np.zeros((2, 11), np.float32)), r"log_decay has shape \(2, 11\)"),
        (dict(initial_state=np.zeros((2, 4, 3, 6), np.float32)), "initial_state has shape"),
        (dict(bonus=np.zeros((4, 3), np.float32)), "bonus was given with read='inclusive'"),
        (dict(read="before"), "read is 'before'"),
        (dict(chunk=0), "chunk is 0"),
        (dict(mask=np.ones((2, 10), bool)), "mask has shape"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(**inputs() | changed)
