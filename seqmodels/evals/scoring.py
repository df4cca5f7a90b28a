"""Nats that a model needs for each token of a text, summed by position in the context."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seqmodels.training.loss import token_nats
from seqmodels.training.sharding import put_batch

LOGIT_TOKENS = 1024  # tokens of a row whose logits exist at once


class PositionSums(NamedTuple):
    """Sums over the rows of a text, each of T tokens.

    nats: [T] float64, sum of -log p(target) at each position. tokens: [T] int64, number of targets there.
    bytes: of the raw text of all these targets.
    """

    nats: np.ndarray
    tokens: np.ndarray
    bytes: int


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def score(model, params: Any, tokens: jax.Array, targets: jax.Array, segment_ids: jax.Array, mesh: Mesh | None = None):
    """-log p(target) in nats, [B, T] float32, each row from a zero state.

    Args:
      model, params: as in docs/architecture.md; params unboxed.
      tokens, targets, segment_ids: [B, T] int32.
      mesh: replicate the result over its devices, so that every process can read it.
    """
    variables = {"params": params}
    hidden, _ = model.apply(variables, tokens, segment_ids=segment_ids)

    def nats_of(piece):
        return token_nats(model.apply(variables, piece[0], method="logits"), piece[1])[0]

    length = targets.shape[1]
    if length <= LOGIT_TOKENS:
        nats = nats_of((hidden, targets))
    else:
        count = -(-length // LOGIT_TOKENS)

        def pieces(x):  # [B, T, ...] -> [count, B, LOGIT_TOKENS, ...]
            x = jnp.pad(x, ((0, 0), (0, count * LOGIT_TOKENS - length)) + ((0, 0),) * (x.ndim - 2))
            return x.reshape(x.shape[0], count, LOGIT_TOKENS, *x.shape[2:]).swapaxes(0, 1)

        nats = jax.lax.map(nats_of, (pieces(hidden), pieces(targets)))
        nats = nats.swapaxes(0, 1).reshape(targets.shape[0], -1)[:, :length]
    if mesh is not None:
        nats = jax.lax.with_sharding_constraint(nats, NamedSharding(mesh, PartitionSpec()))
    return nats


def score_batch(model, params: Any, batch: dict[str, np.ndarray], mesh: Mesh | None) -> np.ndarray:
    """`score` of a batch, spread over a mesh if there is one. Returns [B, T] float64."""
    rows = {name: batch[name] for name in ("tokens", "targets", "segment_ids")}
    if mesh is not None:
        rows = put_batch(rows, mesh)
    return np.asarray(score(model, params, **rows, mesh=mesh)).astype(np.float64)


def rows_of(batch_size: int, mesh: Mesh | None) -> int:
    """The batch size, rounded up to what the devices of a mesh can share."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"] if mesh is not None else 1
    return -(-batch_size // shards) * shards


def position_sums(
    model,
    params: Any,
    split,
    *,
    length: int,
    batch_size: int,
    limit: int | None = None,
    mesh: Mesh | None = None,
    tokenizer=None,
) -> PositionSums:
    """Score a split in order, in rows of `length` tokens, each from a zero state. Every target counts once.

    Args:
      split: a `seqmodels.data.TokenSplit`.
      length: context length T.
      batch_size: rows at once; rounded up to a multiple of the mesh's data and fsdp axes.
      limit: rows to stop after; None is the whole split.
      mesh: devices to spread the rows over.
      tokenizer: counts the bytes of what a limit leaves exactly; without it they are the split's average.
    """
    nats, count = np.zeros(length), np.zeros(length, np.int64)
    for batch in split.windows(length, rows_of(batch_size, mesh), limit):
        nats += np.where(batch["mask"], score_batch(model, params, batch, mesh), 0.0).sum(axis=0)
        count += batch["mask"].sum(axis=0)
    targets, covered = len(split.tokens) - 1, int(count.sum())
    if covered == targets:
        size = split.bytes
    elif tokenizer is None:
        size = round(split.bytes * covered / targets)
    else:
        size = len(tokenizer.decode(split.tokens[1 : covered + 1]).encode())
    return PositionSums(nats, count, size)
