"""Infinity and NaN of one document, of padding and of a dropped state reach no other document, in any implementation.

Kernels for GPUs and TPUs have the same test beside their other ones, in Pallas's interpreter.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from seqmodels import parallel
from seqmodels.kernels.attention import attention
from seqmodels.kernels.attention import xla as attention_xla
from seqmodels.kernels.delta_rule import delta_rule
from seqmodels.kernels.linear_attention import linear_attention
from seqmodels.kernels.linear_scan import linear_scan
from seqmodels.kernels.linear_scan import xla as linear_scan_xla
from seqmodels.kernels.selective_scan import coupled, selective_scan, xla
from seqmodels.kernels.short_conv import short_conv
from tests.kernels.inputs import (
    delta_rule_inputs,
    linear_attention_inputs,
    linear_scan_inputs,
    selective_scan_inputs,
    short_conv_inputs,
)
from tests.kernels.isolation import check_isolation

LENGTHS = (6, 150)  # token by token, several chunks
both = pytest.mark.parametrize("implementation", ["reference", "xla"])


@both
@pytest.mark.parametrize("length", LENGTHS)
def test_selective_scan(implementation, length):
    args = selective_scan_inputs(length=length, groups=2)
    operation = functools.partial(selective_scan, implementation=implementation)
    check_isolation(operation, args, ("u", "dt", "B", "C", "z", "weights"), 1e-5)


def test_selective_scan_by_associative_chunks(monkeypatch):
    """As on GPUs and TPUs."""
    monkeypatch.setattr(xla, "_by_platform", lambda sequential, associative, *arrays: associative(*arrays))
    args = selective_scan_inputs(length=70, groups=2)
    operation = functools.partial(selective_scan, implementation="xla")
    check_isolation(operation, args, ("u", "dt", "B", "C", "z", "weights"), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rank", "carry"])
@pytest.mark.parametrize("associative", [False, True])
def test_coupled_scans(monkeypatch, kind, associative):
    """Token by token, and as on GPUs and TPUs."""
    if associative:
        monkeypatch.setattr(coupled, "_recurrence", xla.linear_recurrence)
    groups, width, state, length = 2, 3, 4, 40
    args = selective_scan_inputs(length=length, groups=groups, width=width, state=state)
    args = {name: args[name] for name in ("u", "dt", "A", "B", "C", "initial_state")} | dict(dt=np.abs(args["dt"]))
    args["C"] = args["C"][:, :, 0]

    def rank(u, dt, A, B, C, initial_state, **documents):
        return coupled.rank_scan(dt[:, :, 0], A[0], u, B, C, initial_state[:, 0], **documents)

    def carry(u, dt, A, B, C, initial_state, gate_channel, gate_state, **documents):
        arrays = (u, dt, A, B, C, gate_channel, gate_state, jnp.eye(state), initial_state, initial_state[:, 1])
        y, *states = coupled.carry_scan(*arrays, **documents)
        return y, jnp.stack(states, axis=1)

    names = ("u", "dt", "B", "C")
    if kind == "carry":
        args |= dict(gate_channel=args["u"][:, :, :1] / 2, gate_state=args["B"][:, :, 1:] / 2)
        names += ("gate_channel", "gate_state")
    check_isolation(dict(rank=rank, carry=carry)[kind], args, names, 1e-5)


@both
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("read", ["inclusive", "exclusive"])
def test_linear_attention(implementation, length, decay, read):
    args = linear_attention_inputs(length=length, decay=decay, bonus=read == "exclusive")
    operation = functools.partial(linear_attention, implementation=implementation, read=read)
    check_isolation(operation, args, ("q", "k", "v", "log_decay"), 1e-5)


@both
@pytest.mark.parametrize("length", LENGTHS)
def test_linear_scan(implementation, length):
    operation = functools.partial(linear_scan, implementation=implementation)
    check_isolation(operation, linear_scan_inputs(length=length), ("log_decay", "x"))


@pytest.mark.parametrize("length", LENGTHS)
def test_linear_scan_in_reverse(length):
    def operation(**arrays):
        turned = {name: jnp.flip(x, 1) if x.shape[1:2] == (length,) else x for name, x in arrays.items()}
        h, state = linear_scan(**turned, reverse=True, implementation="xla")
        return jnp.flip(h, 1), state

    check_isolation(operation, linear_scan_inputs(length=length), ("log_decay", "x"))


def test_linear_scan_by_several_chunks(monkeypatch):
    """As on GPUs and TPUs."""
    monkeypatch.setattr(linear_scan_xla, "_by_platform", lambda whole, several, *arrays: several(*arrays))
    operation = functools.partial(linear_scan, implementation="xla")
    check_isolation(operation, linear_scan_inputs(length=33), ("log_decay", "x"))


DELTA = ("q", "k", "v", "a", "b", "log_decay")


@pytest.mark.slow
@pytest.mark.parametrize("read, decay, length", [("inclusive", "head", 60), ("exclusive", "channel", 60)])
def test_delta_rule(read, decay, length):
    """Several spans of several chunks."""
    args = delta_rule_inputs(length=length, decay=decay)
    check_isolation(functools.partial(delta_rule, implementation="xla", read=read, chunk=7), args, DELTA, 1e-5)


@both
def test_delta_rule_of_a_few_tokens(implementation):
    args = delta_rule_inputs(length=6)
    check_isolation(functools.partial(delta_rule, implementation=implementation), args, DELTA, 1e-5)


@pytest.mark.parametrize("names", ["tied", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qkv", "ab"))])
@pytest.mark.parametrize("overflow", [1e20, pytest.param(1e38, marks=pytest.mark.slow)])
def test_corrections_that_overflow(names, overflow):
    """Finite inputs, whose products, inverses, corrections and states become infinite. Tied: a is left out, it is k."""
    args, options = delta_rule_inputs(length=40), dict(implementation="xla", chunk=16)
    if names == "tied":
        args["k"], options["a"], names = args.pop("a"), None, "qkv"
    for name in names:
        args[name][:, 12:26] *= np.float32(overflow)
    arrays = tuple(name for name in DELTA if name in args)
    check_isolation(functools.partial(delta_rule, **options), args, arrays, 1e-5)


@both
@pytest.mark.parametrize("length", LENGTHS)
def test_short_conv(implementation, length):
    args = short_conv_inputs(length=length, batch=2)
    operation = functools.partial(short_conv, activation="silu", implementation=implementation)
    check_isolation(operation, args, ("x",))


SPLIT = {
    "selective_scan": (selective_scan_inputs(length=40, groups=2, width=4), ("u", "dt", "B", "C", "z", "weights"), {}),
    "linear_attention": (linear_attention_inputs(length=40), ("q", "k", "v", "log_decay"), {}),
    "short_conv": (short_conv_inputs(length=40, batch=2, width=4), ("x",), dict(activation="silu")),
    "delta_rule": (delta_rule_inputs(length=40), DELTA, {}),
    "linear_scan": (linear_scan_inputs(length=40, width=4), ("log_decay", "x"), {}),
}


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("name", SPLIT)
def test_time_split_over_devices(name):
    """Documents and padding cross the cuts; most pieces hold parts of several documents."""
    args, names, options = SPLIT[name]
    mesh = jax.make_mesh((4,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    operation = functools.partial(getattr(parallel, name), implementation="xla", **options)
    with jax.set_mesh(mesh), nn.logical_axis_rules((("length", "sequence"),)):
        check_isolation(operation, args, names, 1e-5)


@pytest.mark.parametrize("overflow", [1e25, 1e38])
def test_finite_numbers_that_overflow(overflow):
    """Products and states that become infinite although every input is finite."""
    args = linear_attention_inputs(length=40)
    for name in "qkv":
        args[name][:, 12:26] *= np.float32(overflow)
    operation = functools.partial(linear_attention, implementation="xla")
    check_isolation(operation, args, ("q", "k", "v", "log_decay"), 1e-5)


@both
@pytest.mark.parametrize("length, keys", [(12, 12), (12, 20), (1, 20)], ids=["rows", "cache", "one query"])
@pytest.mark.parametrize("bad, tile", [(np.nan, 256), (np.inf, 256), (1e30, 256), (np.nan, 3)])
def test_attention(implementation, length, keys, bad, tile, monkeypatch):
    """Rows of two documents, and caches whose other slots hold another document's keys, or none."""
    monkeypatch.setitem(attention_xla.TILE, jax.default_backend(), tile)
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.normal(size=(1, n, h, 4)), jnp.float32) for n, h in ((length, 4), (keys, 2), (keys, 2)))
    ids = np.repeat([0, 1, 2], [5, keys - 10, 5])[None]  # in the cache 0 is the first, and the last are the queries'
    static = dict(segment_ids=ids[:, -length:], key_segment_ids=ids, causal=True)
    static |= dict(positions=np.arange(keys)[None, -length:], key_positions=np.arange(keys)[None])
    of_query, of_key = (jnp.asarray(ids[0, -n:] == 1) for n in (length, keys))
    spoil = lambda x, where: jnp.where(where[None, :, None, None], bad, x)  # noqa: E731

    @jax.jit
    def run(q, k, v, do):
        o, pull = jax.vjp(lambda *a: attention(*a, **static, implementation=implementation), q, k, v)
        return (o, *pull(do))

    do = jnp.asarray(draw.normal(size=q.shape), jnp.float32)
    want = run(q, k, v, do)
    got = run(
        spoil(q, of_query), spoil(k, of_key), spoil(v, of_key), jnp.where(of_query[None, :, None, None], np.nan, do)
    )
    for x, y, where in zip(got, want, (of_query, of_query, of_key, of_key), strict=True):
        np.testing.assert_allclose(x[:, ~where], y[:, ~where], rtol=1e-5, atol=1e-6)
    if of_query.any():
        assert not np.isfinite(got[0][:, of_query]).any()
