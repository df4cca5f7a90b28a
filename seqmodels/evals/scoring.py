"""The loss of a model on each token of a text, in nats, also summed by position in the context."""

import collections
import functools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seqmodels.data.dataset import TokenSplit
from seqmodels.evals import memory
from seqmodels.heads.next_token import token_nats
from seqmodels.training.sharding import put_batch, row_shards, rows_sharding

LOGIT_TOKENS = 1024  # tokens of a row whose logits exist at once


class PositionSums(NamedTuple):
    """Sums over the rows of a text, each of T tokens.

    nats: [T] float64, sum of -log p(target) at each position. tokens: [T] int64, number of targets at each position.
    bytes: length of the raw text of all these targets.
    """

    nats: np.ndarray
    tokens: np.ndarray
    bytes: int


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def score(
    model: nn.Module,
    params: Any,
    tokens: jax.Array,
    targets: jax.Array,
    segment_ids: jax.Array,
    mesh: Mesh | None = None,
) -> jax.Array:
    """-log p(target) in nats, [B, T] float32. Each row starts from a zero state.

    Args:
      model, params: as in docs/architecture.md; params unboxed.
      tokens, targets, segment_ids: [B, T] int32.
      mesh: the result is replicated over its devices, so that every process can read it.
    """
    hidden, _ = model.apply({"params": params}, tokens, segment_ids=segment_ids)
    return _replicate(_nats_and_best(model, params, hidden, targets)[0], mesh)


@functools.partial(jax.jit, static_argnames=("model", "mesh"), donate_argnames="state")
def score_piece(
    model: nn.Module,
    params: Any,
    state: Any,
    tokens: jax.Array,
    targets: jax.Array,
    segment_ids: jax.Array,
    mask: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array, Any]:
    """As `score`, for the next tokens of rows whose beginning was read into `state`. The state is consumed.

    Args:
      state: from `zero_state`, or from the call for the piece before.
      mask: [B, T] bool, False on padding; None: there is none.

    Returns:
      nats [B, T] float32, the likeliest token at each position [B, T] int32, and the new state.
    """
    hidden, state = model.apply({"params": params}, tokens, segment_ids=segment_ids, mask=mask, state=state)
    nats, best = _replicate(_nats_and_best(model, params, hidden, targets), mesh)
    if mesh is not None:  # the sharding that it came in with: one program serves every piece
        state = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, rows_sharding(mesh, x.shape)), state)
    return nats, best, state


def zero_state(model: nn.Module, batch: int, slots: int, mesh: Mesh | None = None) -> Any:
    """The state before the first token. If there is a mesh, its rows are spread over it.

    Args:
      slots: tokens that an attention cache has room for.
    """

    def zeros():
        return model.init_state(batch, slots)

    if mesh is None:
        return jax.jit(zeros)()
    return jax.jit(zeros, out_shardings=jax.tree.map(lambda x: rows_sharding(mesh, x.shape), jax.eval_shape(zeros)))()


def _nats_and_best(model, params, hidden, targets):
    """-log p(target) and the likeliest token, [B, T] both, from hidden states [B, T, D]."""

    def piece_of(piece):
        logits = model.apply({"params": params}, piece[0], method="logits")
        return token_nats(logits, piece[1])[0], jnp.argmax(logits, axis=-1).astype(jnp.int32)

    length = targets.shape[1]
    if length <= LOGIT_TOKENS:
        return piece_of((hidden, targets))
    count = -(-length // LOGIT_TOKENS)

    def pieces(x):  # [B, T, ...] -> [count, B, LOGIT_TOKENS, ...]
        x = jnp.pad(x, ((0, 0), (0, count * LOGIT_TOKENS - length)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], count, LOGIT_TOKENS, *x.shape[2:]).swapaxes(0, 1)

    out = jax.lax.map(piece_of, (pieces(hidden), pieces(targets)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(targets.shape[0], -1)[:, :length], out)


def _replicate(x, mesh):
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def _scores(
    model: nn.Module, params: Any, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh | None
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Each batch with its `score`, [B, T] float64. A batch is spread over the mesh, if there is one.

    A CPU computes two batches side by side: the scan of a recurrence keeps only one of its cores busy.
    """

    def one(batch):
        rows = {name: batch[name] for name in ("tokens", "targets", "segment_ids")}
        part = rows if mesh is None else put_batch(rows, mesh)
        program = _program(score, model, mesh, (params,), part)
        return lambda: np.asarray(program(params, **part)).astype(np.float64)

    devices = jax.devices() if mesh is None else mesh.devices.flat
    at_once = 2 if devices[0].platform == "cpu" and len(devices) == 1 else 1
    with ThreadPoolExecutor(at_once) as pool:
        running: collections.deque = collections.deque()
        for batch in batches:
            running.append((batch, pool.submit(one(batch))))
            if len(running) == at_once:
                batch, scores = running.popleft()
                yield batch, scores.result()
        for batch, scores in running:
            yield batch, scores.result()


def score_long(
    model: nn.Module, params: Any, batch: dict[str, np.ndarray], piece: int, mesh: Mesh | None
) -> tuple[np.ndarray, np.ndarray]:
    """Scores rows of any length T piece by piece, so that only one piece and the state are in memory.

    Args:
      batch: `tokens`, `targets`, `segment_ids`, [B, T] int32.
      piece: tokens of a row that are read at once; it must divide T.

    Returns:
      nats [B, T] float64, and the likeliest token at each position [B, T] int32.

    Raises: UserError if the program needs more memory than is free, as it may for attention's cache of T keys.
    """
    rows, length = batch["tokens"].shape
    names = ("tokens", "targets", "segment_ids")
    state, scores = zero_state(model, rows, length, mesh), []
    if mesh is None and (leaves := jax.tree.leaves(params)):  # there, as the states after it: one program takes all
        state = jax.device_put(state, leaves[0].sharding)
    for start in range(0, length, piece):
        part: dict[str, Any] = {name: batch[name][:, start : start + piece] for name in names}
        part = put_batch(part, mesh) if mesh is not None else part
        program = _program(score_piece, model, mesh, (params, state), part)
        if start == 0:
            memory.check(program, mesh.size if mesh else 1)
        nats, best, state = program(params, state, **part)
        scores.append((nats, best))  # not copied to the host yet, so that the device can go on
    nats, best = (np.concatenate([np.asarray(x) for x in parts], axis=1) for parts in zip(*scores, strict=True))
    return nats.astype(np.float64), best


def _program(scored: Any, model: nn.Module, mesh: Mesh | None, by_place: tuple, by_name: dict) -> jax.stages.Compiled:
    """`score` or `score_piece`, compiled once for all arguments of the same kind.

    Args:
      by_place, by_name: the arguments between model and mesh.
    """
    leaves, tree = jax.tree.flatten((by_place, by_name))
    return _compiled(scored, model, mesh, tree, *map(_kind, leaves))


@functools.lru_cache(maxsize=16)
def _compiled(scored, model, mesh, tree, *kinds):
    by_place, by_name = jax.tree.unflatten(tree, kinds)
    return scored.lower(model, *by_place, **by_name, mesh=mesh).compile()


def _kind(x: jax.Array | np.ndarray) -> jax.ShapeDtypeStruct:
    sharding = x.sharding if isinstance(x, jax.Array) and x.committed else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def _rebuilt(model, params, tokens, targets, segment_ids, mesh=None):
    variables = {"params": params}
    hidden, _ = model.apply(variables, tokens, segment_ids=segment_ids)
    logits = model.apply(variables, hidden, method="outputs")
    return _replicate((token_nats(logits, targets)[0], jnp.argmax(logits, axis=-1)), mesh)


def score_rebuilt(
    model: nn.Module, params: Any, batch: dict[str, np.ndarray], mesh: Mesh | None
) -> tuple[np.ndarray, np.ndarray]:
    """As `score_long`, of a model that predicts all tokens of a row from its end (the head `rebuild`)."""
    rows: dict[str, Any] = {name: batch[name] for name in ("tokens", "targets", "segment_ids")}
    nats, best = _rebuilt(model, params, **(rows if mesh is None else put_batch(rows, mesh)), mesh=mesh)
    return np.asarray(nats).astype(np.float64), np.asarray(best)


def rows_of(batch_size: int, mesh: Mesh | None) -> int:
    """The batch size, rounded up to what the devices of a mesh can share."""
    shards = row_shards(mesh.shape) if mesh is not None else 1
    return -(-batch_size // shards) * shards


def position_sums(
    model: nn.Module,
    params: Any,
    split: TokenSplit,
    *,
    length: int,
    batch_size: int,
    limit: int | None = None,
    mesh: Mesh | None = None,
) -> PositionSums:
    """Scores a split in rows of `length` tokens, each from a zero state. Every token of the split is a target once.

    Args:
      split: a `seqmodels.data.TokenSplit`.
      length: context length T.
      batch_size: rows at once, rounded up to a multiple of the parts that the mesh splits rows into.
      limit: the most rows, spread over the split; None: the whole split.
      mesh: devices to spread the rows over.
    """
    nats, count = np.zeros(length), np.zeros(length, np.int64)
    for batch, scores in _scores(model, params, split.windows(length, rows_of(batch_size, mesh), limit), mesh):
        nats += np.where(batch["mask"], scores, 0.0).sum(axis=0)
        count += batch["mask"].sum(axis=0)
    return PositionSums(nats, count, split.bytes_of(length, limit))
