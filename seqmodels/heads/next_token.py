"""The token after each position: next-token cross-entropy, which never stores the logits of a whole row."""

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jax.tree_util import Partial
from jax.typing import DTypeLike

from seqmodels.heads.head import Batch, Head
from seqmodels.layers.matmul import wide_matmul
from seqmodels.layers.parameter import normal, parameter
from seqmodels.parallel import manual, mesh_axes


@struct.dataclass
class LossSums:
    """Sums over tokens, so that micro-batches add up exactly. Scalars, float32."""

    nats: jax.Array  # sum of -log p(target)
    z_squared: jax.Array  # sum of (log of the softmax's denominator)^2
    count: jax.Array  # number of targets


ZERO = LossSums(*(0.0,) * 3)  # type: ignore[arg-type]  # they become arrays where they are used


def token_nats(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-log p(target) in nats and the log-denominator of the softmax, both float32 and of the shape of targets.

    Args:
      logits: [..., V], any float dtype.
      targets: [...] int32.
    """
    logits = logits.astype(jnp.float32)
    log_z = log_sum_exp(logits)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_z - chosen, log_z


def log_sum_exp(x: jax.Array) -> jax.Array:
    """log sum exp of float32 x over the last axis, not differentiable.

    On accelerators, where memory traffic dominates, one pass updates the maximum so far and the sum relative to it.
    On the CPU there are two passes.
    """

    def one_pass(x):
        def combine(first, second):
            (m, s), (n, t) = first, second
            shrink = jnp.exp(-jnp.abs(m - n))
            return jnp.maximum(m, n), jnp.where(m < n, s * shrink + t, s + t * shrink)

        start = jnp.finfo(jnp.float32).min, jnp.float32(0)
        largest, total = jax.lax.reduce((x, jnp.ones_like(x)), start, combine, (x.ndim - 1,))
        return largest + jnp.log(total)

    return jax.lax.platform_dependent(x, cpu=lambda x: jax.nn.logsumexp(x, axis=-1), default=one_pass)


def next_token_loss(
    logits_of: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None = None,
    chunk: int = 0,
    z_weight: float = 0.0,
    read: DTypeLike | None = None,
) -> tuple[jax.Array, LossSums]:
    """Cross-entropy of a batch, computed `chunk` tokens of each row at a time.

    Only one chunk's logits [B, chunk, V] are in memory at a time. If the loss is differentiated, each chunk's gradients
    are computed right after its value, from the same logits. The loss is a sum over tokens, so the backward pass only
    scales these gradients.

    On a mesh each device goes through the chunks of its own rows and its own piece of time: `chunk` tokens are cut in
    as many parts. So no hidden state leaves its device, and sums and gradients of tables cross devices once, after the
    last chunk.

    Args:
      logits_of: hidden [B, t, D] -> logits [B, t, V]. The loss is also differentiable in the arrays of a
        jax.tree_util.Partial, or, on a single device, in those that the function closes over.
      hidden: [B, T, D].
      targets: [B, T] int32; -1 where there is nothing to predict.
      weights: [B, T] float, 0 where a token does not count. None: all targets that are not negative count.
      chunk: tokens per chunk. With 0, or a chunk as long as the row, all tokens are computed together.
      z_weight: weight of the squared log-denominators.
      read: dtype in which `logits_of` reads its arrays. Devices send them to each other in this dtype. None: as they
        are.

    Returns:
      nats + z_weight * z_squared, float32; and the sums, which carry no gradient.
    """
    weights = (targets >= 0 if weights is None else weights).astype(jnp.float32)
    hidden = jnp.where(weights[..., None] != 0, hidden, 0)  # what does not count may hold anything
    if not isinstance(logits_of, Partial):
        converted, closed_over = jax.closure_convert(logits_of, hidden[:, : chunk or None])
        logits_of = Partial(
            lambda *tables_and_hidden: converted(tables_and_hidden[-1], *tables_and_hidden[:-1]), *closed_over
        )
    tables, tree = jax.tree.flatten(logits_of)
    of_pieces = functools.partial(
        _of_pieces, lambda h, *tables: jax.tree.unflatten(tree, tables)(h), chunk=chunk, z_weight=z_weight
    )

    def total(sums):
        return sums.nats + z_weight * sums.z_squared, sums

    def as_read(tables):
        return tables if read is None else [table.astype(read) for table in tables]

    @jax.custom_vjp
    def loss(hidden, tables):
        return total(of_pieces(hidden, as_read(tables), targets, weights, gradients=False)[0])

    def forward(hidden, tables):
        sums, dh, dtables = of_pieces(hidden, as_read(tables), targets, weights, gradients=True)
        return total(sums), (dh, [d.astype(table.dtype) for d, table in zip(dtables, tables, strict=True)])

    def backward(gradients, cotangents):
        return jax.tree.map(lambda g: (cotangents[0] * g).astype(g.dtype), gradients)

    loss.defvjp(forward, backward)
    return loss(hidden, tables)


def _of_pieces(logits_of, hidden, tables, targets, weights, chunk, z_weight, gradients):
    """`_of_chunks` on each device's rows and piece of time, and its sums over the devices."""
    split = mesh_axes(batch=targets.shape[0], length=targets.shape[1]) or {}
    axes = tuple(axis for name in ("batch", "length") for axis in split.get(name, ()))
    of_chunks = functools.partial(_of_chunks, logits_of, z_weight=z_weight, gradients=gradients)
    if not axes:
        return of_chunks(hidden, tables, targets, weights, chunk=chunk)
    mesh = jax.sharding.get_abstract_mesh()
    chunk = -(-chunk // math.prod(mesh.shape[axis] for axis in split.get("length", ())))

    stored = _stored(tables, hidden.shape[-1], axes)

    def piece(hidden, tables, targets, weights):
        sums, dh, dtables = of_chunks(hidden, tables, targets, weights, chunk=chunk)
        if gradients:
            dtables = [_added(d, axes, spec) for d, spec in zip(dtables, stored, strict=True)]
        return jax.lax.psum(sums, axes), dh, dtables

    tokens, whole = PartitionSpec(split.get("batch"), split.get("length")), PartitionSpec()
    outputs = whole, tokens, stored if gradients else None
    specs = dict(in_specs=(tokens, whole, tokens, tokens), out_specs=outputs)
    run = jax.shard_map(piece, **specs, axis_names=manual(axes), check_vma=False)
    return run(hidden, tables, targets, weights)


def _stored(tables, width: int, axes: tuple[str, ...]) -> list[PartitionSpec]:
    """How those of the mesh axes that add up a table's gradient split it: over its axis of the model's width.

    Not beside an axis that the compiler splits tables over: XLA would gather them there before it adds up parts.
    """
    mesh = jax.sharding.get_abstract_mesh()
    others = set(mesh.axis_names) - manual(axes) - set(mesh.manual_axes)
    split = () if others else (mesh_axes(embed=width) or {}).get("embed", ())
    parts = tuple(axis for axis in split if axis in axes)

    def spec(shape):
        return PartitionSpec(*(None,) * shape.index(width), parts) if parts and width in shape else PartitionSpec()

    return [spec(table.shape) for table in tables]


def _added(gradient: jax.Array, axes: tuple[str, ...], stored: PartitionSpec) -> jax.Array:
    """The sum of a gradient over mesh axes, of which each device gets the part that `stored` says."""
    parts = stored[-1] if stored else ()
    if parts:
        gradient = jax.lax.psum_scatter(gradient, parts, scatter_dimension=len(stored) - 1, tiled=True)
    rest = tuple(axis for axis in axes if axis not in parts)
    return jax.lax.psum(gradient, rest) if rest else gradient


def _of_chunks(logits_of, hidden, tables, targets, weights, chunk, z_weight, gradients):
    """Sums over the tokens, and their gradients: of hidden, and of tables in float32. None without `gradients`."""
    batch, length = targets.shape
    chunk = chunk if 0 < chunk < length else length
    count = -(-length // chunk)

    def split(x):  # [B, T, ...] -> [count, B, chunk, ...], the end padded with tokens of weight 0
        x = jnp.pad(x, ((0, 0), (0, count * chunk - length)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(batch, count, chunk, *x.shape[2:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(batch, count * chunk, *x.shape[3:])[:, :length]

    def sums_of(logits, y, w):
        nats, log_z = token_nats(logits, y)
        return LossSums((nats * w).sum(), (log_z**2 * w).sum(), w.sum()), log_z

    def value(sums, piece):
        h, y, w = piece
        return jax.tree.map(jnp.add, sums, sums_of(logits_of(h, *tables), y, w)[0]), None

    def value_and_gradients(carry, piece):
        h, y, w = piece
        logits, pullback = jax.vjp(logits_of, h, *tables)
        sums, log_z = sums_of(logits, y, w)
        is_target = y[..., None] == jnp.arange(logits.shape[-1])  # no scatter: one pass over the logits
        softmax = jnp.exp(logits.astype(jnp.float32) - log_z[..., None])
        slope = softmax * (1 + 2 * z_weight * log_z[..., None]) - is_target
        dh, *dtables = pullback((slope * w[..., None]).astype(logits.dtype))
        totals, dtotals = carry
        dtotals = [total + d.astype(total.dtype) for total, d in zip(dtotals, dtables, strict=True)]
        return (jax.tree.map(jnp.add, totals, sums), dtotals), dh

    pieces = split(hidden), split(targets), split(weights)
    if not gradients:
        return jax.lax.scan(value, ZERO, pieces)[0], None, None
    zeros = [jnp.zeros(table.shape, jnp.promote_types(table.dtype, jnp.float32)) for table in tables]
    (sums, dtables), dh = jax.lax.scan(value_and_gradients, (ZERO, zeros), pieces)
    return sums, join(dh), dtables


def _logits(matrix, hidden, tied, dtype, softcap):
    """[B, T, D] to [B, T, V] float32; the matrix is [V, D] if tied, else [D, V]."""
    kernel = matrix.T if tied else matrix
    logits = wide_matmul(hidden.astype(dtype), kernel.astype(dtype))
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


class NextToken(Head):
    """Logits [B, T, V] of the token after each position, V = `size` the padded vocabulary.

    Attributes:
        tied: whether the input's table is the matrix of the logits, too. Else the head has a matrix `head` [D, V].
        softcap: limit of the logits, which z approaches as softcap tanh(z / softcap); 0: there is none.
    """

    tied: bool = True
    softcap: float = 0.0

    at_root: ClassVar[bool] = True
    method: ClassVar[str] = "logits"
    target: ClassVar[str] = "targets"
    causal: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    def setup(self) -> None:
        if not self.tied:
            shape, axes, init = (self.width, self.size), ("embed", "vocab"), normal(self.width**-0.5)
            self.kernel = parameter(self, "head", shape, axes, init, dtype=self.dtype, group="head")

    def __call__(self, hidden: jax.Array, mask: jax.Array | None = None, table: jax.Array | None = None) -> jax.Array:
        """[B, T, D], and the input's table [V, D] if tied, to [B, T, V] float32. The mask is not used."""
        return self.unembedding(table)(hidden)

    def unembedding(self, table: jax.Array | None = None) -> Partial:
        """The function from hidden states to logits, whose only array is its matrix; see `__call__`."""
        tied = self.tied and table is not None
        function = functools.partial(_logits, tied=tied, dtype=self.dtype, softcap=self.softcap)
        return Partial(function, table if tied else self.kernel)

    @staticmethod
    def options(training: Any) -> dict[str, Any]:
        """Keyword arguments of `loss` that `config.training` holds."""
        return {"chunk": training.loss_chunk, "z_weight": training.z_loss}

    @staticmethod
    def loss(
        outputs_of: Callable[..., Any],
        hidden: jax.Array,
        batch: Batch,
        chunk: int = 0,
        z_weight: float = 0.0,
    ) -> tuple[jax.Array, LossSums]:
        """`next_token_loss` of a batch's `targets` [B, T] int32. Targets of -1 do not count."""
        logits_of = outputs_of(method="unembedding")
        return next_token_loss(logits_of, hidden, batch["targets"], None, chunk, z_weight, read=hidden.dtype)

    @staticmethod
    def figures(sums: LossSums, chunk: int = 0, z_weight: float = 0.0) -> dict[str, jax.Array]:
        """loss: nats per token. z_loss, if it has a weight: the nats per token that it adds."""
        figures = {"loss": sums.nats / sums.count}
        if z_weight:
            figures["z_loss"] = z_weight * sums.z_squared / sums.count
        return figures
