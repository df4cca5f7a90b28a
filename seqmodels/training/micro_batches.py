"""Micro-batches: the rows of a step in pieces, one after the other, whose gradients and sums add up.

On a mesh each device of the axis APART, which is `data`, adds up the gradients of its own rows in float32, and the
devices add up their sums once, after the last piece, in the dtypes of a step without micro-batches. Left to itself XLA
exchanges the gradients of every piece (for GPUs, in jax 0.11, it moves most of these exchanges behind the loop). On the
other axes gradients are still exchanged for every piece:

- fsdp: a device holds the sum of a part of each gradient. The sum of whole gradients would take 4 bytes a parameter on
  each device, which fsdp is there to save.
- sequence, tensor, expert: devices work on the same rows together, and what they send depends on the piece.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from seqmodels.layers.parameter import declarations
from seqmodels.parallel import APART, manual


def batch_gradients(
    loss_sums: Callable, pieces: int, boxed: Any, together: bool = False
) -> Callable[..., tuple[Any, Any, Any]]:
    """The function (params, batch, carry, rngs) -> (gradients, sums, carry) of a batch: its sums and their gradients.

    Args:
        loss_sums: of `seqmodels.training.step.make_loss`.
        pieces: number of micro-batches.
        boxed: the abstract parameters with their declarations.
        together: whether devices must not go through their micro-batches apart, because the model draws random numbers
            for each row: these follow from a row's place among the rows of all devices.
    """
    gradients = jax.grad(loss_sums, has_aux=True)

    def whole(params, batch, carry, rngs):
        grads, (sums, carry, _) = gradients(params, batch, carry, rngs)
        return grads, sums, carry

    def one_by_one(params, batch, carry, rngs):
        def body(totals, piece):
            (total, running), (index, rows, rows_carry) = totals, piece
            streams = dict(rngs, dropout=jax.random.fold_in(rngs["dropout"], index))
            grads, (sums, new_carry, running) = gradients(params, rows, rows_carry, streams, running)
            return (jax.tree.map(jnp.add, total, (grads, sums)), running), new_carry

        def of_first(batch, carry):
            rows, rows_carry = jax.tree.map(lambda x: x[0], split_rows((batch, carry), pieces))
            sums, _, running = loss_sums(params, rows, rows_carry, rngs, {})[1]
            return sums, running

        # What branches report, and what they keep between micro-batches, is known only from a trace.
        shapes = jax.eval_shape(of_first, batch, carry)
        sums, running = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        zero = (jax.tree.map(jnp.zeros_like, params), sums), running
        parts = (jnp.arange(pieces), split_rows(batch, pieces), split_rows(carry, pieces))
        ((grads, sums), _), new_carry = jax.lax.scan(body, zero, parts)
        return grads, sums, join_rows(new_carry)

    if pieces == 1:
        return whole
    return one_by_one if together else apart(one_by_one, [leaf.read for leaf in declarations(boxed)])


def apart(function: Callable[..., tuple[Any, Any, Any]], sent: list[DTypeLike]) -> Callable[..., tuple[Any, Any, Any]]:
    """`function`, as `batch_gradients` returns, by each device of the axis APART on its own rows; its sums added up.

    Args:
        sent: dtypes in which the leaves of the gradients cross devices.
    """

    def total(grads):
        leaves, tree = jax.tree.flatten(grads)
        rounded = [x.astype(dtype) for x, dtype in zip(leaves, sent, strict=True)]
        return jax.tree.unflatten(tree, [x.astype(jnp.float32) for x in jax.lax.psum(rounded, APART)])

    def part(*arguments):
        taken = jax.sharding.get_abstract_mesh().manual_axes
        with nn.logical_axis_rules([(name, _without(taken, rule)) for name, rule in nn.get_logical_axis_rules()]):
            grads, sums, carry = function(*arguments)
        return total(grads), jax.lax.psum(sums, APART), carry

    def on_mesh(*arguments):
        if jax.sharding.get_abstract_mesh().shape.get(APART, 1) == 1:
            return function(*arguments)
        rows, same = PartitionSpec(APART), PartitionSpec()
        specs = dict(in_specs=(same, rows, rows, same), out_specs=(same, same, rows))
        return jax.shard_map(part, **specs, axis_names=manual((APART,)), check_vma=False)(*arguments)

    return on_mesh


def _without(taken: tuple[str, ...], rule: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
    """A logical axis rule without the mesh axes `taken`."""
    axes = (rule,) if isinstance(rule, str) else rule or ()
    return tuple(axis for axis in axes if axis not in taken) or None


def split_rows(tree: Any, pieces: int) -> Any:
    """[B, ...] to [pieces, B / pieces, ...]. Piece i has the rows i, i + pieces, ...: no row changes its device."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1), tree)


def join_rows(tree: Any) -> Any:
    """The inverse of split_rows."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree)
