"""Softmax attention of short rows: a strip of queries meets at once all keys that it may see. For CPUs.

A strip has few queries, and its keys lie between the first and the last that its positions allow, so about half of the
scores of a causal row are never computed. There is one softmax for each strip, nothing is merged, and the weights
exp(score - highest) are kept for the backward pass, which needs neither scores nor exponentials again. The strips are
written out one after the other, without a loop. So rows must be short: `xla` serves the others, in linear memory.
Everything is float32, or float64 if an argument is.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from seqmodels.kernels.attention import tiles
from seqmodels.kernels.attention.arguments import Inputs, Options, Side, Tokens
from seqmodels.kernels.attention.visible import sees

STRIP = 64  # queries
STRIPS = 16  # most strips, because each is compiled by itself
LARGEST = 2**23  # most scores, of all rows and heads together, because half of them are kept


def supports(
    platform: str,
    queries: int = 2 * STRIP,
    keys: int = 2 * STRIP,
    scores: int = 0,
    positioned: bool = False,
    biased: bool = False,
    capped: bool = False,
    pattern: bool = False,
    **facts: object,
) -> str | None:
    """Why this backend cannot serve the call; None: it can."""
    if biased or capped or pattern:
        return "there are biases, gates, a cap or a pattern"
    if positioned or keys != queries:
        return "keys and queries are not the tokens of the same rows, at positions 0 to T - 1"
    if not STRIP < queries <= STRIPS * STRIP:
        return f"T is {queries}; it serves from {STRIP + 1} to {STRIPS * STRIP} tokens"
    if scores > LARGEST:
        return f"there are {scores} scores; it serves at most {LARGEST}, of which it keeps half"
    return None


class Kept(NamedTuple):
    """What a strip keeps for its backward pass: weights [X, Y, C], their sums [X, Y, 1] and o [X, Y, d], float32.

    As in all arrays here, X counts rows and key heads, and Y the queries that share a key head.
    """

    weights: jax.Array
    total: jax.Array
    o: jax.Array


def attention(inputs: Inputs, tokens: Tokens, options: Options) -> jax.Array:
    """See `kernels.attention.attention`."""
    return _attend(options, inputs, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, inputs: Inputs, tokens: Tokens) -> jax.Array:
    return _forward(options, inputs, tokens)[0]


def _forward(options, inputs, tokens):
    queries, (k, v) = _queries(inputs, options.scale * _wide(inputs, inputs.q)), _keys(inputs)
    kept = []
    for q, (columns, seen) in zip(queries, _meetings(options, inputs, tokens), strict=True):
        scores = jnp.einsum("xyd,xsd->xys", q, k[:, columns])
        lowest = jnp.finfo(scores.dtype).min
        if seen is not None:
            scores = jnp.where(seen, scores, lowest)
        # more than the lowest, so that the weights of a query that sees no key are zero
        highest = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), lowest / 2)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        total = jnp.where(total == 0, 1, total)
        kept.append(Kept(weights, total, jnp.einsum("xys,xsd->xyd", weights, v[:, columns]) / total))
    o = _joined(inputs, [strip.o for strip in kept]).astype(inputs.q.dtype)
    return checkpoint_name(o, "scan"), (inputs, tokens, kept)


def _backward(options, residuals, do):
    inputs, tokens, kept = residuals
    queries, (k, v) = _queries(inputs, options.scale * _wide(inputs, inputs.q)), _keys(inputs)
    strips = queries, _queries(inputs, _wide(inputs, do)), kept, _meetings(options, inputs, tokens)
    length = inputs.q.shape[1]
    dqs, dks, dvs = [], [], []
    for q, do_strip, (weights, total, o), (columns, _) in zip(*strips, strict=True):
        share = do_strip / total  # so the weights need no division
        delta = jnp.sum(share * o, axis=-1, keepdims=True)
        dscores = weights * (jnp.einsum("xyd,xsd->xys", share, v[:, columns]) - delta)
        dqs.append(jnp.einsum("xys,xsd->xyd", dscores, k[:, columns]))
        around = ((0, 0), (columns.start, length - columns.stop), (0, 0))
        dks.append(jnp.pad(jnp.einsum("xys,xyd->xsd", dscores, q), around))
        dvs.append(jnp.pad(jnp.einsum("xys,xyd->xsd", weights, share), around))
    heads_apart = (inputs.k.shape[0], inputs.k.shape[2], length, -1)
    dk, dv = (jnp.moveaxis(sum(x[1:], start=x[0]).reshape(heads_apart), 1, 2) for x in (dks, dvs))
    gradients = inputs._replace(q=options.scale * _joined(inputs, dqs), k=dk, v=dv)
    return jax.tree.map(lambda x, dx: dx.astype(x.dtype), inputs, gradients), None


_attend.defvjp(_forward, _backward)


def _wide(inputs: Inputs, x: jax.Array) -> jax.Array:
    return x.astype(inputs.accumulator)


def _keys(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Keys and values, [B, T, Hkv, d] to [X, T, d]."""
    _, length, _, width = inputs.k.shape
    k, v = (jnp.moveaxis(_wide(inputs, x), 1, 2).reshape(-1, length, width) for x in (inputs.k, inputs.v))
    return k, v


def _queries(inputs: Inputs, x: jax.Array) -> jax.Array:
    """[B, T, H, d] in strips, [N, X, Y, d]."""
    strips = tiles.grouped(x, inputs.k.shape[2], STRIP)  # [N, B, Hkv, H / Hkv, R, d]
    return strips.reshape(len(strips), strips.shape[1] * strips.shape[2], -1, strips.shape[-1])


def _joined(inputs: Inputs, strips: list[jax.Array]) -> jax.Array:
    """Undo `_queries`."""
    batch, length, heads, _ = inputs.q.shape
    kv_heads = inputs.k.shape[2]
    x = jnp.stack(strips).reshape(len(strips), batch, kv_heads, heads // kv_heads, STRIP, -1)
    return tiles.ungrouped(x, length)


def _meetings(options: Options, inputs: Inputs, tokens: Tokens) -> Iterator[tuple[slice, jax.Array | None]]:
    """For each strip the keys that its positions allow, and which query sees which of them [X, Y, C] bool.

    None: every query sees every key.
    """
    batch, length, heads, _ = inputs.q.shape
    kv_heads, mask = inputs.k.shape[2], options.mask
    queries, keys = tiles.side(tokens.queries(length), STRIP), tokens.keys(length)
    for n, position in enumerate(np.asarray(queries.position)):
        columns = slice(0, length)
        if not mask.trivial:
            allowed = mask.sees(position[0][:, None], np.asarray(keys.position)).any(axis=0)
            columns = slice(int(np.argmax(allowed)), length - int(np.argmax(allowed[::-1])))
        rows = Side(position, None if queries.segment is None else queries.segment[n])
        segment = None if keys.segment is None else keys.segment[:, columns]
        real = None if keys.real is None else keys.real[:, columns]
        seen = sees(mask, rows, Side(keys.position[:, columns], segment, real))
        if seen is not None:
            shape = batch, kv_heads, heads // kv_heads, *seen.shape[1:]
            seen = jnp.broadcast_to(seen[:, None, None], shape).reshape(batch * kv_heads, -1, shape[-1])
        yield columns, seen
