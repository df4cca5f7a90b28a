"""Softmax attention in tiles, which never stores the scores [T, S]: Rabe and Staats 2021 (arXiv 2112.05682).

A tile of queries visits the tiles of keys that it may see, one by one, and merges what they give by their greatest
scores (online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867). The backward pass computes the scores of a tile
again, and the weights from each query's greatest score and sum (Dao et al. 2022, arXiv 2205.14135, section 3). Memory
is linear in T and S. Tiles in which no query sees a key take no time. The factors of products have the dtype of the
activations; everything else is float32, or float64 if an argument is.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.kernels.attention import tiles
from seqmodels.kernels.attention.arguments import Inputs, Options, Side, Tokens
from seqmodels.kernels.attention.visible import sees

TILE = {"cpu": 256, "default": 512}  # tokens per tile, of queries and of keys; tuned on a CPU only


def supports(platform: str, **facts: object) -> str | None:
    """Why this backend cannot serve the call; None: it can (it always can)."""
    return None


def attention(inputs: Inputs, tokens: Tokens, options: Options) -> jax.Array:
    """See `kernels.attention.attention`."""
    return _attend(options, inputs, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, inputs: Inputs, tokens: Tokens) -> jax.Array:
    return forward(options, inputs, tokens)[0]


def _attend_fwd(options, inputs, tokens):
    # a checkpoint policy that saves "scan" saves these, so they are not computed again
    outputs = [checkpoint_name(x, "scan") for x in forward(options, inputs, tokens)]
    return outputs[0], (inputs, tokens, *outputs)


def _attend_bwd(options, residuals, do):
    inputs, tokens, o, highest, total = residuals
    single = _tile_sizes(options, inputs)[1] == inputs.k.shape[1]
    delta = None if single else jnp.sum(o.astype(total.dtype) * do.astype(total.dtype), axis=-1)
    gradients = backward(options, inputs, tokens, highest, total, delta, do)
    return jax.tree.map(lambda x, dx: dx.astype(x.dtype), inputs, gradients), None


_attend.defvjp(_attend_fwd, _attend_bwd)


class Rows(NamedTuple):
    """A tile of queries: q [B, Hkv, H / Hkv, R, d], gates [B, Hkv, H / Hkv, R] or None, and its tokens [B or 1, R]."""

    q: jax.Array
    gates: jax.Array | None
    side: Side


class Columns(NamedTuple):
    """A tile of keys: k, v [B, Hkv, C, d], gates [B, Hkv, H / Hkv, C] or None, and its tokens [B or 1, C]."""

    k: jax.Array
    v: jax.Array
    gates: jax.Array | None
    side: Side


class Sums(NamedTuple):
    """What queries have of some keys.

    The axes are those of the queries: [B, T, H, d] for values, without d for the others, or [B, Hkv, H / Hkv, R, d] in
    a tile.

    Attributes:
        highest: the greatest score; the lowest number if no key was seen.
        total: sum of the weights exp(score - highest).
        values: sum of the values, each times its weight.
    """

    highest: jax.Array
    total: jax.Array
    values: jax.Array


def forward(options: Options, inputs: Inputs, tokens: Tokens) -> tuple[jax.Array, jax.Array, jax.Array]:
    """o [B, T, H, d], and highest and total of the `sums`."""
    highest, total, values = sums(options, inputs, tokens)
    return divided(values, total).astype(inputs.q.dtype), highest, total


def sums(options: Options, inputs: Inputs, tokens: Tokens) -> Sums:
    """What all queries have of these keys."""
    queries, keys, plan = _cut(options, inputs, tokens)

    def of_row(_, row):
        queries, order, count = row
        visit = lambda n, sums: merged(sums, _sums(options, inputs, queries, _at(keys, order[n])))  # noqa: E731
        return None, _visits(order, count, visit, no_sums(queries.q.shape, inputs.accumulator))

    _, found = _scan(of_row, None, (queries, *plan))
    return Sums(*(tiles.ungrouped(x, inputs.q.shape[1]) for x in found))


def no_sums(shape: tuple[int, ...], dtype: jnp.dtype) -> Sums:
    """What queries of this shape have of no key."""
    zero = jnp.zeros(shape, dtype)
    return Sums(zero[..., 0] + jnp.finfo(dtype).min, zero[..., 0], zero)


def merged(a: Sums, b: Sums) -> Sums:
    """The sums over the keys of both."""
    highest = jnp.maximum(a.highest, b.highest)
    of_a, of_b = jnp.exp(a.highest - highest), jnp.exp(b.highest - highest)
    values = of_a[..., None] * a.values + of_b[..., None] * b.values
    return Sums(highest, of_a * a.total + of_b * b.total, values)


def divided(x: jax.Array, total: jax.Array) -> jax.Array:
    """x [..., n] / total [...]; where total is 0, x itself."""
    return x / jnp.where(total == 0, 1, total)[..., None]


def _sums(options: Options, inputs: Inputs, queries: Rows, keys: Columns) -> Sums:
    """What a tile of queries has of a tile of keys."""
    products, change, seen = _scores(options, inputs, queries, keys)
    scores = change(products, keys.gates, inputs.bias_weights)
    highest = jnp.max(scores, axis=-1, where=seen, initial=jnp.finfo(scores.dtype).min)
    weights = _where(seen, jnp.exp(scores - highest[..., None]))
    values = _product("bngts,bnsd->bngtd", weights.astype(keys.v.dtype), keys.v, scores.dtype)
    return Sums(highest, jnp.sum(weights, axis=-1), values)


class Gradients(NamedTuple):
    """Sums of gradients: of a tile of queries, of all tiles of keys, and of the bias."""

    queries: Any
    keys: Any
    bias_weights: Any


def backward(
    options: Options,
    inputs: Inputs,
    tokens: Tokens,
    highest: jax.Array,
    total: jax.Array,
    delta: jax.Array | None,
    do: jax.Array,
) -> Inputs:
    """Gradients of the inputs, in the accumulator's dtype.

    Args:
        highest, total: [B, T, H], as `forward` gives them, for these keys or for more.
        delta: [B, T, H], sum over d of o do. None: a tile has all keys that the queries see, and gives it exactly. o is
            rounded, which matters where a query sees a few keys.
        do: [B, T, H, d], gradient of o.
    """
    queries, keys, plan = _cut(options, inputs, tokens)
    accumulator, kv_heads = inputs.accumulator, inputs.k.shape[2]
    size = queries.q.shape[-2]
    of_o = tuple(tiles.grouped(x, kv_heads, size) for x in (do.astype(inputs.q.dtype), highest, total, delta))
    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, accumulator))

    def of_row(gradients, row):
        queries, of_o, order, count = row

        def visit(n, sums):
            of_queries, of_keys, of_bias = _gradients(options, inputs, queries, _at(keys, order[n]), *of_o)
            kept = jax.tree.map(lambda sum, x: sum.at[order[n]].add(x), sums.keys, of_keys)
            added = jax.tree.map(jnp.add, (sums.queries, sums.bias_weights), (of_queries, of_bias))
            return Gradients(added[0], kept, added[1])

        sums = gradients._replace(queries=zeros(queries.q))
        sums = _visits(order, count, visit, sums)
        return sums._replace(queries=None), sums.queries

    start = Gradients(None, zeros((keys.k, keys.v, keys.gates)), zeros(inputs.bias_weights))
    (_, (dk, dv, dkey_gates), dbias), dq = _scan(of_row, start, (queries, of_o, *plan))
    length, slots = inputs.q.shape[1], inputs.k.shape[1]
    dq, dkey_gates = tiles.ungrouped(dq, length), tiles.ungrouped(dkey_gates, slots)
    dk, dv = (jnp.moveaxis(tiles.joined(x, slots, 2), 2, 1) for x in (dk, dv))
    dgates = None if inputs.gates is None else jnp.zeros_like(inputs.gates)
    return Inputs(dq, dk, dv, dbias, dgates, dkey_gates)


def _gradients(
    options: Options,
    inputs: Inputs,
    queries: Rows,
    keys: Columns,
    do: jax.Array,
    highest: jax.Array,
    total: jax.Array,
    delta: jax.Array | None,
) -> Gradients:
    """What a tile of queries and a tile of keys add to each other's gradients.

    Args:
        do: [B, Hkv, H / Hkv, R, d]. highest, total, delta: [B, Hkv, H / Hkv, R]; see `backward`.
    """
    products, change, seen = _scores(options, inputs, queries, keys)
    scores, pull = jax.vjp(change, products, keys.gates, inputs.bias_weights)
    weights = _where(seen, divided(jnp.exp(scores - highest[..., None]), total))
    dweights = _product("bngtd,bnsd->bngts", do, keys.v, scores.dtype)
    delta = jnp.sum(weights * dweights, axis=-1) if delta is None else delta
    dproducts, dkey_gates, dbias = pull(weights * (dweights - delta[..., None]))
    dproducts = dproducts.astype(keys.k.dtype)
    dq = _product("bngts,bnsd->bngtd", dproducts, keys.k, scores.dtype)
    dk = _product("bngts,bngtd->bnsd", dproducts, queries.q, scores.dtype)
    dv = _product("bngts,bngtd->bnsd", weights.astype(do.dtype), do, scores.dtype)
    return Gradients(dq, (dk, dv, dkey_gates), dbias)


def _scores(
    options: Options, inputs: Inputs, queries: Rows, keys: Columns
) -> tuple[jax.Array, Callable[..., jax.Array], jax.Array | None]:
    """Products q_t . k_s [B, Hkv, H / Hkv, R, C], what makes scores of them, key gates and weights, and who sees whom.

    The last is [B or 1, 1, 1, R, C] bool; None: every query sees every key.
    """
    products = _product("bngtd,bnsd->bngts", queries.q, keys.k, inputs.accumulator)
    i, j = jnp.asarray(queries.side.position)[:, :, None], jnp.asarray(keys.side.position)[:, None, :]

    def change(products, key_gates, bias_weights):
        return options.scores(products, i, j, queries.gates, key_gates, bias_weights)

    seen = sees(options.mask, queries.side, keys.side)
    return products, change, None if seen is None else seen[:, None, None]


def _product(subscripts: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=dtype)


def _where(seen: jax.Array | None, weights: jax.Array) -> jax.Array:
    return weights if seen is None else jnp.where(seen, weights, 0)


def _scan(of_row: Callable, carry: Any, rows: Any) -> Any:
    """`lax.scan` over the tiles of queries. For a single one there is no loop, which takes less time to compile."""
    if len(jax.tree.leaves(rows)[0]) > 1:
        return jax.lax.scan(of_row, carry, rows)
    carry, outputs = of_row(carry, _at(rows, 0))
    return carry, jax.tree.map(lambda x: x[None], outputs)


def _visits(order: jax.Array, count: jax.Array, visit: Callable, sums: Any) -> Any:
    """Sums after all visits of a tile of queries. Where there is a single tile of keys, no loop is needed."""
    return visit(0, sums) if len(order) == 1 else jax.lax.fori_loop(0, count, visit, sums)


def _cut(options: Options, inputs: Inputs, tokens: Tokens) -> tuple[Rows, Columns, tiles.Plan]:
    """All tiles of queries and all tiles of keys, which a new first axis counts, and which of them meet."""
    queries, keys, kv_heads = inputs.q.shape[1], *inputs.k.shape[1:3]
    rows, columns = _tile_sizes(options, inputs)
    q, gates = (tiles.grouped(x, kv_heads, rows) for x in (inputs.q, inputs.gates))
    k, v = (tiles.cut(jnp.moveaxis(x, 1, 2), columns, 2) for x in (inputs.k, inputs.v))
    key_gates = tiles.grouped(inputs.key_gates, kv_heads, columns)
    sides = tiles.side(tokens.queries(queries), rows), tiles.side(tokens.keys(keys), columns)
    plan = jax.tree.map(jnp.asarray, tiles.plan(options.mask, *sides))
    return Rows(q, gates, sides[0]), Columns(k, v, key_gates, sides[1]), plan


def _tile_sizes(options: Options, inputs: Inputs) -> tuple[int, int]:
    """Queries and keys per tile: all, if that is no more work than a tile, else whole blocks of a pattern."""
    queries, keys, pattern = inputs.q.shape[1], inputs.k.shape[1], options.mask.pattern
    tile = TILE.get(jax.default_backend(), TILE["default"])
    if queries * keys <= tile * tile:
        return queries, keys
    if pattern is not None and pattern.block <= tile:
        tile = tile // pattern.block * pattern.block
    rows = min(tile, queries)
    return rows, min(tile * tile // rows, keys)


def _at(tree: Any, n: Any) -> Any:
    """Tile n."""
    return jax.tree.map(lambda x: jnp.asarray(x)[n], tree)
