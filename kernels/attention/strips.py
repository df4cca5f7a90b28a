"""Softmax attention of short rows: a strip of queries meets at once all keys that it may see. For CPUs.

A strip has few queries, and its keys lie between the first and the last that its positions allow, so about half of the
scores of a causal row are never computed. There is one softmax for each strip, nothing is merged, and the weights
exp(score - highest) are kept for the backward pass, which needs neither scores nor exponentials again. The strips are
written out one after the other, without a loop. So rows must be short: `xla` serves the others, in linear memory.
Everything is float32, or float64 if an argument is.

Scores are kept as [keys, queries]. Then each of the six products is a plain one, of rows by columns, after transposing
only queries, keys and values, which are small. With [queries, keys] the gradients of keys and values would be products
of a transposed matrix, for which XLA takes four times as long on a CPU.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from seqmodels.kernels.arrays import computed_once
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
    """What a strip keeps for its backward pass: weights [X, C, Y], their sums [X, 1, Y] and o [X, d, Y], float32.

    As in all arrays here, X counts rows and key heads, C keys, and Y the queries that share a key head.
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
    queries, k, _, _, vt = _arranged(options, inputs)
    kept = []
    for q, (columns, seen) in zip(queries, _meetings(options, inputs, tokens), strict=True):
        scores = k[:, columns] @ q.mT
        lowest = jnp.finfo(scores.dtype).min
        if seen is not None:
            scores = jnp.where(seen, scores, lowest)
        # more than the lowest, so that the weights of a query that sees no key are zero
        highest = jnp.maximum(jnp.max(scores, axis=1, keepdims=True), lowest / 2)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=1, keepdims=True)
        total = jnp.where(total == 0, 1, total)
        kept.append(Kept(weights, total, vt[:, :, columns] @ weights / total))
    o = _joined(inputs, [strip.o for strip in kept]).astype(inputs.q.dtype)
    return checkpoint_name(o, "scan"), (inputs, tokens, kept)


def _backward(options, residuals, do):
    inputs, tokens, kept = residuals
    queries, _, kt, v, _ = _arranged(options, inputs)
    shares = _queries(inputs, _wide(inputs, do))
    spans = [columns for columns, _ in _meetings(options, inputs, tokens)]
    dqs, dks, dvs = [], [], []
    for q, do_strip, (weights, total, o), columns in zip(queries, shares, kept, spans, strict=True):
        share = do_strip.mT / total  # [X, d, Y]; so the weights need no division
        delta = jnp.sum(share * o, axis=1, keepdims=True)
        dscores = weights * (v[:, columns] @ share - delta)
        dqs.append(kt[:, :, columns] @ dscores)
        dks.append(dscores @ q)
        dvs.append(weights @ share.mT)
    batch, length, kv_heads, width = inputs.k.shape
    dk, dv = (jnp.moveaxis(_summed(x, spans, length).reshape(batch, kv_heads, length, width), 1, 2) for x in (dks, dvs))
    # Each is read more than once, as by the gradient of rotary positions
    dq, dk, dv = computed_once((options.scale * _joined(inputs, dqs), dk, dv))
    gradients = inputs._replace(q=dq, k=dk, v=dv)
    return jax.tree.map(lambda x, dx: dx.astype(x.dtype), inputs, gradients), None


_attend.defvjp(_forward, _backward)


def _wide(inputs: Inputs, x: jax.Array) -> jax.Array:
    return x.astype(inputs.accumulator)


def _arranged(options: Options, inputs: Inputs) -> tuple[jax.Array, ...]:
    """Queries [N, X, Y, d], scaled; keys [X, T, d] and [X, d, T]; values, likewise."""
    q = _queries(inputs, options.scale * _wide(inputs, inputs.q))
    k, v = _keys(inputs, inputs.k), _keys(inputs, inputs.v)
    return computed_once((q, k, k.mT, v, v.mT))


def _keys(inputs: Inputs, x: jax.Array) -> jax.Array:
    """Keys or values, [B, T, Hkv, d] to [X, T, d]."""
    _, length, _, width = x.shape
    return jnp.moveaxis(_wide(inputs, x), 1, 2).reshape(-1, length, width)


def _queries(inputs: Inputs, x: jax.Array) -> jax.Array:
    """[B, T, H, d] in strips, [N, X, Y, d]."""
    strips = tiles.grouped(x, inputs.k.shape[2], STRIP)  # [N, B, Hkv, H / Hkv, R, d]
    return strips.reshape(len(strips), strips.shape[1] * strips.shape[2], -1, strips.shape[-1])


def _joined(inputs: Inputs, strips: list[jax.Array]) -> jax.Array:
    """Undo `_queries`, for strips [X, d, Y]."""
    batch, length, heads, width = inputs.q.shape
    kv_heads = inputs.k.shape[2]
    x = jnp.stack(strips).reshape(len(strips), batch, kv_heads, width, heads // kv_heads, STRIP)
    return tiles.ungrouped(jnp.moveaxis(x, 3, -1), length)


def _summed(parts: Sequence[jax.Array], spans: Sequence[slice], length: int) -> jax.Array:
    """The sum [X, T, d] of parts [X, C, d], each of which belongs to the keys of its span.

    Between two ends of spans the same parts meet, and only these are read.
    """
    ends = sorted({0, length, *(end for span in spans for end in (span.start, span.stop))})
    pieces = []
    for start, stop in itertools.pairwise(ends):
        met = [
            part[:, start - span.start : stop - span.start]
            for part, span in zip(parts, spans, strict=True)
            if span.start <= start and stop <= span.stop
        ]
        nothing = jnp.zeros_like(parts[0], shape=(parts[0].shape[0], stop - start, parts[0].shape[2]))
        pieces.append(sum(met[1:], start=met[0]) if met else nothing)
    return jnp.concatenate(pieces, axis=1)


def _meetings(options: Options, inputs: Inputs, tokens: Tokens) -> Iterator[tuple[slice, jax.Array | None]]:
    """For each strip the keys that its positions allow, and which of them a query sees, [X or 1, C, Y] bool.

    None: every query sees every key.
    """
    length, heads, kv_heads = *inputs.q.shape[1:3], inputs.k.shape[2]
    mask = options.mask
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
            seen = jnp.tile(computed_once(seen.mT), (1, 1, heads // kv_heads))
            seen = seen if len(seen) == 1 else jnp.repeat(seen, kv_heads, axis=0)
        yield columns, seen
