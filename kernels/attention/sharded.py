"""Attention with time split over devices, for use inside `jax.shard_map`.

Where the heads of keys divide over the devices, they exchange heads for time: each device gets the whole time of a part
of the heads, by an all-to-all, computes attention as one device does, and gives the outputs back (Jacobs et al. 2023,
DeepSpeed Ulysses, arXiv 2309.14509). Only documents, masks and positions, which are small, are gathered.

Otherwise the pieces of keys and values go around a ring of the devices (Liu et al. 2023, Ring Attention, arXiv
2310.01889). Each device merges what its queries have of one piece after the other, by the greatest scores. In the
backward pass the gradients of keys and values go around with them, and the scores are computed again. A piece that no
query of a device sees takes no time there. So with a causal mask the last of S devices would have S times the work of
the first, and all would wait for it. Therefore the time is cut into 2 S halves of pieces before, and device n gets the
halves n and 2 S - 1 - n (Brandon et al. 2023, Striped Attention, arXiv 2311.09431, notes the imbalance; the order is
that of Llama 3's context parallelism: Dubey et al. 2024, arXiv 2407.21783, section 3.3.2). Then each device has the
same work with each piece.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.kernels import attention as op
from seqmodels.kernels.attention import xla
from seqmodels.kernels.attention.apart import apart, hide
from seqmodels.kernels.attention.arguments import Inputs, Options, Side, Tokens
from seqmodels.kernels.attention.biases import Bias
from seqmodels.kernels.attention.masks import Mask, Pattern
from seqmodels.kernels.attention.visible import reached
from seqmodels.kernels.dispatch import UnsupportedError

Axis = str | tuple[str, ...]
Moves = list[tuple[int, int]]  # from a device to another


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis: Axis,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    pattern: Pattern | None = None,
    segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Bias | None = None,
    bias_weights: jax.Array | None = None,
    gates: jax.Array | None = None,
    key_gates: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """As `kernels.attention.attention` of the whole time.

    Args:
        axis: mesh axis (or axes) that time is split over. Pieces follow the order of the axis and have equal lengths.
        arrays with a time axis: this device's piece, of queries and of keys. bias_weights are the same on every device.

    Returns:
        o of this device's piece. The enclosing shard_map needs check_vma=False. It sums the gradients of bias_weights.

    Raises:
        UnsupportedError: the heads do not divide, and another implementation than "xla" is named.
    """
    rules: dict[str, Any] = dict(causal=causal, window=window, sinks=sinks, pattern=pattern)
    rules |= dict(scale=scale, softcap=softcap, bias=bias)
    tokens: dict[str, Any] = dict(segment_ids=segment_ids, key_segment_ids=key_segment_ids, key_mask=key_mask)
    tokens |= dict(positions=positions, key_positions=key_positions)
    numbers: dict[str, Any] = dict(q=q, k=k, v=v, gates=gates, key_gates=key_gates)
    devices = jax.lax.axis_size(axis)
    if k.shape[2] % devices == 0:
        return _heads_for_time(axis, numbers, bias_weights, **rules, **tokens, implementation=implementation)
    if implementation not in (None, "xla"):
        raise UnsupportedError(
            f"attention: implementation {implementation!r} cannot serve: {k.shape[2]} heads of keys do not divide over "
            f"{devices} devices of time, and only 'xla' computes pieces of keys one by one"
        )
    if positions is None:
        place = jax.lax.axis_index(axis) * q.shape[1] + jnp.arange(q.shape[1], dtype=jnp.int32)
        tokens["positions"] = jnp.broadcast_to(place, q.shape[:2])
    halved = causal and window is None and q.shape[1] % 2 == 0  # in a window the pieces as they are are balanced
    if halved:
        numbers, tokens = jax.tree.map(functools.partial(_folded, axis=axis), (numbers, tokens))
    inputs, described, options = op.arguments(**numbers, bias_weights=bias_weights, **rules, **tokens)
    inputs, attend = hide(inputs, described.key_mask), functools.partial(_ring, Around(axis, options))
    if segment_ids is None:
        o = attend(inputs, described)
    else:
        o = apart(attend, functools.partial(_reached, axis, options.mask), inputs, described)
    return _unfolded(o, axis) if halved else o


def _folded(x: jax.Array, axis: Axis) -> jax.Array:
    """The halves n and 2 S - 1 - n of pieces [B, T / S, ...] on device n of S, in any order, from piece n."""
    return _exchanged(x, axis, lambda moves: moves)


def _unfolded(x: jax.Array, axis: Axis) -> jax.Array:
    """Undo `_folded`."""
    return _exchanged(x, axis, lambda moves: [(there, here) for here, there in moves])


def _exchanged(x: jax.Array, axis: Axis, turned: Callable[[Moves], Moves]) -> jax.Array:
    """The first halves, and the second ones, each sent to one device. `turned`: which way they go."""
    size = jax.lax.axis_size(axis)
    halves = jnp.split(x, 2, axis=1)
    for second in (0, 1):
        # of piece n it is the half 2 n + second of the time; the two halves of a device come from different sides
        place = [2 * n + second for n in range(size)]
        moves = [(n, min(half, 2 * size - 1 - half)) for n, half in enumerate(place)]
        halves[second] = jax.lax.ppermute(halves[second], axis, turned(moves))
    return jnp.concatenate(halves, axis=1)


def _heads_for_time(axis: Axis, numbers: dict[str, Any], bias_weights: jax.Array | None, **options: Any) -> jax.Array:
    """Attention of a part of the heads over the whole time, and from it all heads of this device's piece of time."""
    tokens = ("segment_ids", "key_segment_ids", "key_mask", "positions", "key_positions")
    options |= {name: _whole(options[name], axis) for name in tokens}
    numbers = {name: _heads_apart(x, axis) for name, x in numbers.items()}
    if bias_weights is not None:
        heads = numbers["q"].shape[2]
        bias_weights = jax.lax.dynamic_slice_in_dim(bias_weights, jax.lax.axis_index(axis) * heads, heads)
    o = op.attention(**numbers, bias_weights=bias_weights, **options)
    return jax.lax.all_to_all(o, axis, 1, 2, tiled=True)


def _whole(x: jax.Array | None, axis: Axis) -> jax.Array | None:
    """[B, T] of all devices from their pieces."""
    return None if x is None else jax.lax.all_gather(x, axis, axis=1, tiled=True)


def _heads_apart(x: jax.Array | None, axis: Axis) -> Any:
    """[B, T, H / S, ...], the whole time of a part of the heads, from [B, T / S, H, ...]."""
    return None if x is None else jax.lax.all_to_all(x, axis, 2, 1, tiled=True)


class Around(NamedTuple):
    """Static options of the ring."""

    axis: Axis
    options: Options


class Piece(NamedTuple):
    """What goes around the ring: a piece of keys, and its tokens."""

    k: jax.Array
    v: jax.Array
    key_gates: jax.Array | None
    side: Side


def _piece(inputs: Inputs, tokens: Tokens) -> Piece:
    """This device's own piece."""
    return Piece(inputs.k, inputs.v, inputs.key_gates, tokens.keys(inputs.k.shape[1]))


def _with(inputs: Inputs, tokens: Tokens, piece: Piece) -> tuple[Inputs, Tokens]:
    """The queries with another piece of keys."""
    inputs = inputs._replace(k=piece.k, v=piece.v, key_gates=piece.key_gates)
    return inputs, _seeing(tokens, piece.side)


def _seeing(tokens: Tokens, keys: Side) -> Tokens:
    """The queries with other keys."""
    arrays: dict[str, Any] = dict(key_segment_ids=keys.segment, key_mask=keys.real, key_positions=keys.position)
    return tokens._replace(**arrays)


def _next(tree: Any, axis: Axis) -> Any:
    """Send arrays to the next device of the ring."""
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(tree, axis, [(n, (n + 1) % size) for n in range(size)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(around: Around, inputs: Inputs, tokens: Tokens) -> jax.Array:
    return _forward(around, inputs, tokens)[0]


def _forward(around: Around, inputs: Inputs, tokens: Tokens) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `xla.forward`, over all pieces of keys."""
    axis, options = around

    def visit(carry, _):
        piece, sums = carry
        new = xla.sums(options, *_with(inputs, tokens, piece))
        return (_next(piece, axis), xla.merged(sums, new)), None

    start = _piece(inputs, tokens), xla.no_sums(inputs.q.shape, inputs.accumulator)
    (_, sums), _ = jax.lax.scan(visit, start, length=jax.lax.axis_size(axis))
    return xla.divided(sums.values, sums.total).astype(inputs.q.dtype), sums.highest, sums.total


def _ring_fwd(around, inputs, tokens):
    o, highest, total = (checkpoint_name(x, "scan") for x in _forward(around, inputs, tokens))
    return o, (inputs, tokens, o, highest, total)


def _ring_bwd(around, residuals, do):
    (axis, options), (inputs, tokens, o, highest, total) = around, residuals
    delta = jnp.sum(o.astype(total.dtype) * do.astype(total.dtype), axis=-1)

    def visit(carry, _):
        piece, of_piece, of_queries = carry
        here = _with(inputs, tokens, piece)
        gradients = xla.backward(options, *here, highest, total, delta, do)
        new = gradients.k, gradients.v, gradients.key_gates
        of_piece = jax.tree.map(jnp.add, of_piece, new)
        of_queries = jax.tree.map(jnp.add, of_queries, (gradients.q, gradients.bias_weights))
        return (*_next((piece, of_piece), axis), of_queries), None

    piece = _piece(inputs, tokens)
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, total.dtype), tree)  # noqa: E731
    start = piece, zeros((piece.k, piece.v, piece.key_gates)), zeros((inputs.q, inputs.bias_weights))
    (_, (dk, dv, dkey_gates), (dq, dbias)), _ = jax.lax.scan(visit, start, length=jax.lax.axis_size(axis))
    gradients = Inputs(dq, dk, dv, dbias, zeros(inputs.gates), dkey_gates)
    return jax.tree.map(lambda x, dx: dx.astype(x.dtype), inputs, gradients), None


_ring.defvjp(_ring_fwd, _ring_bwd)


def _reached(axis: Axis, mask: Mask, bad: jax.Array, queries: int, tokens: Tokens) -> jax.Array:
    """As `reached`, over all pieces of keys."""

    def visit(carry, _):
        bad, keys, found = carry
        found |= reached(bad, queries, _seeing(tokens, keys), mask=mask)
        return (*_next((bad, keys), axis), found), None

    start = bad, tokens.keys(bad.shape[1]), jnp.zeros((len(bad), queries), bool)
    return jax.lax.scan(visit, start, length=jax.lax.axis_size(axis))[0][2]
