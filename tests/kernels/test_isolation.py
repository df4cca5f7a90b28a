"""Infinity and NaN of one document, of padding and of a dropped state reach no other document, in any implementation.

Kernels for GPUs and TPUs have the same test beside their other ones, in Pallas's interpreter.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels.attention import attention
from seqmodels.kernels.linear_attention import linear_attention
from seqmodels.kernels.selective_scan import selective_scan
from seqmodels.kernels.short_conv import short_conv
from tests.kernels.inputs import linear_attention_inputs, selective_scan_inputs, short_conv_inputs
from tests.kernels.isolation import check_isolation

LENGTHS = (6, 40, 150)  # token by token, one chunk, several chunks
both = pytest.mark.parametrize("implementation", ["reference", "xla"])


@both
@pytest.mark.parametrize("length", LENGTHS)
def test_selective_scan(implementation, length):
    args = selective_scan_inputs(length=length, groups=2)
    operation = functools.partial(selective_scan, implementation=implementation)
    check_isolation(operation, args, ("u", "dt", "B", "C", "z", "weights"), 1e-5)


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
def test_short_conv(implementation, length):
    args = short_conv_inputs(length=length, batch=2)
    operation = functools.partial(short_conv, activation="silu", implementation=implementation)
    check_isolation(operation, args, ("x",))


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
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_attention(implementation, length, keys, bad):
    """Rows of two documents, and caches whose other slots hold another document's keys, or none."""
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
