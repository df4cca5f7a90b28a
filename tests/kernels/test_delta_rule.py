"""Every implementation of the delta rule against its definition in NumPy, in float64, forward and backward."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels import delta_rule as op
from seqmodels.kernels.delta_rule import delta_rule, xla
from seqmodels.kernels.delta_rule.triangular import unit_inverse
from seqmodels.kernels.dispatch import UnsupportedError
from tests.kernels.helpers import (
    assert_close,
    assert_finite,
    compiled,
    documents,
    in_two_calls,
    last_segment,
    poisoned,
    serving,
    stacked,
    value_and_gradients,
)
from tests.kernels.inputs import delta_rule_inputs as inputs
from tests.kernels.inputs import extreme_decays

FACTS = dict(shape=(1, 1, 1, 1, 1, 1), dtype=np.dtype("float32"), decay="head", read="inclusive", chunk=None)
SERVING = serving(op, **FACTS)
BACKENDS = [name for name in SERVING if name != "reference"]
TIME = ("q", "k", "v", "a", "b", "log_decay")  # arrays with a time axis
EXCLUSIVE, TIED = dict(read="exclusive"), dict(a=None)
fast = pytest.mark.parametrize("implementation", BACKENDS)


def definition(args, static, scale=1.0, read="inclusive", **ignored):
    """y, the final state, and the gradients of the functional of `value_and_gradients`: one token after the other."""
    x = {name: np.asarray(value, np.float64) for name, value in args.items()}
    x.setdefault("a", x["k"])
    (batch, length, heads, values), keys = x["v"].shape, x["q"].shape[3]
    wide = {name: np.repeat(x[name], heads // x[name].shape[2], axis=2) for name in "qkab"}
    logs = x.get("log_decay", np.zeros((batch, length, heads)))
    decays = np.broadcast_to(np.exp(logs if logs.ndim == 4 else logs[..., None]), (batch, length, heads, keys))
    mask = np.asarray(static.get("mask", np.ones((batch, length), bool)))
    ids = static.get("segment_ids")
    y, last = np.zeros((batch, length, heads, values)), np.zeros((batch, heads, keys, values))
    draw = np.random.default_rng(7)
    dy, dlast = draw.normal(size=y.shape), draw.normal(size=last.shape)
    out = {name: np.zeros_like(value) for name, value in {**wide, "v": x["v"]}.items()}
    dlogs, dstart = np.zeros((batch, length, heads, keys)), np.zeros_like(last)
    start = x.get("initial_state", np.zeros_like(last))
    for row, head in itertools.product(range(batch), range(heads)):
        S, tokens = start[row, head], []
        for t in np.flatnonzero(mask[row]):
            known = last_segment(static, t)[row] if ids is not None else None
            old = S if ids is None or known == ids[row, t] else 0 * S
            q, k, v, a, b, w = (
                z[row, t, head] for z in (*(wide[n] for n in "qk"), x["v"], wide["a"], wide["b"], decays)
            )
            S = w[:, None] * old - np.outer(a, b @ old) + np.outer(k, v)
            y[row, t, head] = scale * q @ (S if read == "inclusive" else old)
            tokens.append((t, old is not S and (ids is None or known == ids[row, t]), old, S, (q, k, v, a, b, w)))
        last[row, head], G = S, dlast[row, head]
        for t, kept, old, S, (q, k, v, a, b, w) in reversed(tokens):
            d, at = scale * dy[row, t, head], (row, t, head)
            out["q"][at] = (S if read == "inclusive" else old) @ d
            G = G + np.outer(q, d) if read == "inclusive" else G
            u, du = b @ old, -(a @ G)
            out["k"][at], out["v"][at], out["a"][at], out["b"][at] = G @ v, k @ G, -(G @ u), old @ du
            dlogs[at] = w * np.sum(G * old, axis=1)
            G = w[:, None] * G + np.outer(b, du) + (0 if read == "inclusive" else np.outer(q, d))
            G = G if kept else 0 * G
        dstart[row, head] = G
    gradients = {n: g.reshape(*x[n].shape[:3], -1, g.shape[3]).sum(3) if n in wide else g for n, g in out.items()}
    gradients |= dict(initial_state=dstart, log_decay=dlogs if logs.ndim == 4 else dlogs.sum(-1))
    if "a" not in args:
        gradients["k"] = gradients["k"] + gradients["a"]
    return (y, last), {name: gradients[name] for name in args}


def tied(args):
    """As `args`, with a left out: it is k."""
    return {name: x for name, x in args.items() if name != "a"} | dict(k=args["a"])


def against_definition(implementation, args, static, options=None, tolerance=1e-5):
    got = value_and_gradients(delta_rule, args, static, implementation, options)
    assert_finite(got)
    assert_close(got, definition(args, static, **options or {}), tolerance)


# shape, documents, options
BOTH = dict(packed=True, padded=True)
LONG = dict(length=xla.SPAN * xla.CHUNK + 9, keys=2, values=3, heads=2, groups=1)
CASES = {
    "no decay": (dict(decay="none", own=""), {}, EXCLUSIVE | TIED),
    "head, one group": (dict(groups=1, own="kab"), dict(packed=True, padded=False), dict(scale=0.7)),
    "head, exclusive, padded": (dict(groups=4), dict(packed=False, padded=True), EXCLUSIVE | TIED | dict(scale=0.7)),
    "head, short chunks": (dict(length=23), BOTH, dict(chunk=3)),
    "head, several spans": (LONG, BOTH, TIED),
    "channel, exclusive": (dict(decay="channel", length=35, own="b"), BOTH, EXCLUSIVE | dict(scale=0.7)),
    "channel, several spans": (dict(decay="channel", length=xla.SPAN * xla.BLOCK + 9), BOTH, TIED),
    "a few tokens": (dict(length=5), BOTH, TIED | dict(scale=0.7)),
    "a few tokens, exclusive": (dict(length=5, decay="channel"), BOTH, EXCLUSIVE),
}


@pytest.mark.parametrize("case", CASES)
@fast
def test_equals_definition(implementation, case):
    shape, layout, options = CASES[case]
    static = documents(length=shape.get("length", 11), **layout) if layout else {}
    args = inputs(**shape)
    against_definition(implementation, tied(args) if "a" in options else args, static, options)


@pytest.mark.parametrize("decay, options", [("head", TIED), ("channel", EXCLUSIVE)])
def test_reference_equals_definition(decay, options):
    args = inputs(decay=decay)
    against_definition("reference", tied(args) if "a" in options else args, documents(length=11), options)


@fast
def test_bfloat16(implementation):
    args = inputs(length=80, keys=16, values=8)
    half = {
        n: jnp.asarray(x, jnp.float32 if n in ("log_decay", "initial_state") else jnp.bfloat16) for n, x in args.items()
    }
    (y, state), gradients = got = value_and_gradients(delta_rule, half, {}, implementation)
    assert y.dtype == gradients["a"].dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert_close(got, definition(half, {}), 1.5e-2)


@fast
def test_equal_keys_do_not_cancel(implementation):
    """The worst case for a series in powers of the system: all keys the same, and each takes all that is there."""
    args = inputs(length=64, groups=1, heads=1, keys=4, own="", decay="none")
    key = np.float32([0.5, -0.5, 0.5, 0.5])
    args |= {name: np.broadcast_to(key, args[name].shape) for name in "kab"}
    y, state = compiled(delta_rule, implementation)(**args)
    want, _ = definition(args, {})
    assert_close((y, state), want, 1e-6)
    np.testing.assert_allclose(key @ state[0, 0], args["v"][0, -1, 0], rtol=1e-5)  # it holds the last value


@pytest.mark.parametrize("size", [1, 2, 7, 16, 37])
def test_inverses(size):
    draw = np.random.default_rng(size)
    L = np.tril(draw.normal(size=(3, size, size)), -1).astype(np.float32)
    weights = draw.normal(size=L.shape)
    want = np.linalg.inv(np.eye(size) + L)
    slope = -np.tril(np.swapaxes(want, 1, 2) @ weights @ np.swapaxes(want, 1, 2), -1)

    def functional(L):
        T, _ = unit_inverse(L, False)
        return jnp.sum(T * weights), T

    (_, T), gradient = jax.jit(jax.value_and_grad(functional, has_aux=True))(L)
    assert_close((T, gradient + 1), (want, slope + 1), 2e-5)


def test_an_inverse_that_overflows_spoils_its_own_rows_alone():
    L = np.zeros((9, 9), np.float32)
    L[1, 0], L[3, 2], L[4, 3], L[5, 4], L[8, 7] = 0.5, 1e30, 1e30, 1e30, 0.25
    T, bad = jax.jit(unit_inverse, static_argnums=1)(L, True)
    assert np.isfinite(T).all()
    np.testing.assert_array_equal(np.flatnonzero(bad), [4, 5])
    assert T[1, 0] == -0.5 and T[8, 7] == -0.25


@pytest.mark.parametrize("cut", [1, 9])
@fast
def test_state_carries_over(implementation, cut):
    args, static = inputs(), documents(length=11)
    run = compiled(delta_rule, implementation)
    whole, whole_state = run(**args, **static)
    y, state = in_two_calls(run, args, static, cut, TIME)
    assert_close((y, state), (whole, whole_state), 1e-6)


@fast
def test_documents_are_apart(implementation):
    """A packed row equals its documents one by one."""
    args = inputs(batch=1, length=24)
    start = args.pop("initial_state")
    run, bounds = compiled(delta_rule, implementation), [0, 3, 12, 15, 24]
    ids = np.repeat([5, 2, 9, 2], np.diff(bounds))[None].astype(np.int32)
    y, state = run(**args, initial_state=start, segment_ids=ids)
    for first, (begin, end) in enumerate(itertools.pairwise(bounds)):
        own = {name: x[:, begin:end] for name, x in args.items()}
        alone, alone_state = run(**own, initial_state=np.zeros_like(start) if first else start)
        assert_close(y[:, begin:end], alone, 1e-6)
    assert_close(state, alone_state, 1e-6)


@fast
def test_poisoned_padding_never_leaks(implementation):
    args, static = inputs(), documents(length=11)
    hidden = poisoned(args, static["mask"], TIME)
    got = value_and_gradients(delta_rule, hidden, static, implementation)
    assert_close(got, value_and_gradients(delta_rule, args, static, implementation), 1e-7)
    assert (got[0][0][~static["mask"]] == 0).all()


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("strong", ["mixed", "-30 a token"])
@fast
def test_strong_decays(implementation, decay, strong):
    """No decay, all gone at once, and what is left after tokens of both: finite, and as exact as ever."""
    args = inputs(decay=decay, length=40)
    shape = args["log_decay"].shape
    args["log_decay"] = extreme_decays(shape) if strong == "mixed" else np.full(shape, -30, np.float32)
    against_definition(implementation, args, documents(length=40), dict(chunk=16))


@fast
def test_deterministic(implementation):
    args, static = inputs(length=23), documents(length=23)
    first, second = (value_and_gradients(delta_rule, args, static, implementation, dict(chunk=3)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
@fast
def test_vmap(implementation):
    args = [inputs(seed=s) for s in (0, 1)]
    run = functools.partial(value_and_gradients, delta_rule, static={}, implementation=implementation)
    assert_close(jax.vmap(lambda x: run(args=x))(stacked(args)), stacked([run(args=a) for a in args]), 1e-5)


@pytest.mark.parametrize("decay", ["head", "channel"])
@fast
def test_memory_grows_with_spans_not_tokens(implementation, decay):
    """What the gradient of a long sequence needs a token is a fraction of one state a token."""
    heads, keys, values = 2, 32, 64

    def temporary(length):
        shape = dict(batch=1, length=length, groups=1, heads=heads, keys=keys, values=values, decay=decay)
        f = jax.jit(jax.grad(lambda args: jnp.sum(delta_rule(**args, implementation=implementation)[0])))
        return f.lower(inputs(**shape)).compile().memory_analysis().temp_size_in_bytes

    bytes_per_token = (temporary(4096) - temporary(2048)) / 2048
    state = heads * keys * values * 4
    arrays = 4 * (3 * keys + heads * (values + 2 * keys))  # q, k, b, and of each head v, a and decays
    assert bytes_per_token < state / xla.BLOCK / xla.SPAN + 4 * arrays < state / 2, bytes_per_token


def test_a_donated_state_is_updated_in_place():
    args = inputs(length=1, keys=32, values=64)
    state = args.pop("initial_state")
    step = jax.jit(lambda state, args: delta_rule(**args, initial_state=state), donate_argnums=0)
    memory = step.lower(state, args).compile().memory_analysis()
    assert memory.alias_size_in_bytes == state.nbytes > memory.temp_size_in_bytes


def test_unknown_implementation_is_named():
    with pytest.raises(UnsupportedError, match=r"'cuda'.*reference, xla"):
        delta_rule(**inputs(), implementation="cuda")


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(v=np.zeros((2, 11, 3, 5), np.float32)), "a multiple of Hk"),
        (inputs(length=0), "T is 0"),
        (dict(a=np.zeros((2, 11, 1, 3), np.float32)), r"a has shape \(2, 11, 1, 3\)"),
        (dict(log_decay=np.zeros((2, 11, 2), np.float32)), r"log_decay has shape \(2, 11, 2\)"),
        (dict(initial_state=np.zeros((2, 4, 3, 6), np.float32)), "initial_state has shape"),
        (dict(read="before"), "read is 'before'"),
        (dict(chunk=0), "chunk is 0"),
        (dict(mask=np.ones((2, 10), bool)), "mask has shape"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        delta_rule(**inputs() | changed)


# What other recurrences are cases of it, as their sources write them: q, k, v and what is particular, per token

UNIT = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731


def kda(S, k, v, g, beta):
    """Kimi Linear (arXiv 2510.26692), equation 1."""
    return (np.eye(len(k)) - beta * np.outer(k, k)) @ (np.exp(g)[:, None] * S) + beta * np.outer(k, v)


def rwkv7(S, k, v, g, rate, removal):
    """RWKV-7 (arXiv 2503.14456), equation 17, whose state is the transpose."""
    left = np.diag(np.exp(g)) - np.outer(removal, rate * removal)
    return (S.T @ left + np.outer(v, k)).T


def gain(S, k, v, g, beta):
    """The gain of Conba without its base, from the errors k = v: K_{t+1} = lambda K_t + beta (1 - K_t) k k^T."""
    K = S.T
    return (np.exp(g[0]) * K + beta * np.outer(v, k) - beta * K @ np.outer(k, k)).T


@pytest.mark.parametrize("formula", [kda, rwkv7, gain], ids=lambda f: f.__name__)
@fast
def test_recurrences_that_are_cases_of_it(implementation, formula):
    length, keys = 12, 4
    draw = np.random.default_rng(2)
    q, k, v, other = (draw.normal(size=(length, keys)) for _ in range(4))
    g, beta, rate = -np.abs(draw.normal(size=(length, keys))), draw.random(length), draw.random((length, keys))
    k, removal = (UNIT(k), UNIT(other)) if formula is not rwkv7 else (k, UNIT(other))
    v = k if formula is gain else v
    options, S, want = dict(read="exclusive") if formula is gain else {}, np.zeros((keys, keys)), []
    for t in range(length):
        old, particular = S, (rate[t], removal[t]) if formula is rwkv7 else (beta[t],)
        S = formula(S, k[t], v[t], g[t], *particular)
        want.append(q[t] @ (old if formula is gain else S))
    if formula is rwkv7:
        written, a, b = k, rate * removal, removal
    else:
        written = a = beta[:, None] * k
        b = np.exp(g) * k if formula is kda else k
    logs = g[None, :, None, :1].squeeze(-1) if formula is gain else g[None, :, None]
    arrays = (np.float32(x)[None, :, None] for x in (q, written, v, a, b))
    y, state = compiled(delta_rule, implementation, **options)(*arrays, np.float32(logs))
    assert_close((y[0, :, 0], state[0, 0]), (np.stack(want), S), 1e-5)
