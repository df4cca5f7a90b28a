"""Aids for finding a mistake in a model, chosen by `config.training.debug`; docs/debugging.md shows them at work."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jax.tree_util import Partial
from ml_collections import ConfigDict, FrozenConfigDict

from seqmodels.errors import UserError
from seqmodels.heads import HEADS
from seqmodels.interop.stacking import unstack
from seqmodels.training.micro_batches import split_rows
from seqmodels.training.sharding import AXES, unbox
from seqmodels.training.state import TrainState
from seqmodels.training.step import make_loss, random_streams


def mode(config: ConfigDict) -> str:
    """`config.training.debug`: "nans", "shapes", "nojit" or "". Raises: UserError where it cannot work."""
    chosen = config.training.debug
    if chosen == "nans" and config.training.nan != "stop":
        raise UserError(f"config.training.debug='nans': needs config.training.nan='stop', not {config.training.nan!r}")
    return chosen


class NotCompiled:
    """In place of a lowered step: what it "compiles" to runs one operation at a time, so that `print` shows values."""

    def __init__(self, train_step: Callable, *_: Any) -> None:
        self.train_step = train_step

    def compile(self) -> Callable:
        def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
            with jax.disable_jit():
                return self.train_step(state, batch)

        return step


# Shapes


def shape_table(model: nn.Module, config: ConfigDict, batch: dict[str, Any]) -> str:
    """A line for each call of a module in the loss of a batch, in the order in which they return: arrays in and out.

    The loss calls `unembedding` for a few tokens at a time (`training.loss_chunk`). Its line has their logits. Nothing
    is computed. Blocks under `scan_blocks` stand for all that the scan goes over.

    Args:
      batch: arrays or jax.ShapeDtypeStruct, as `dataset.spec` says.
    """
    calls: dict[tuple[str, str], tuple[str, str]] = {}

    def note(path: str, module: nn.Module, arguments: tuple, result: Any) -> None:
        calls[path, type(module).__name__] = _shapes(arguments), _shapes(result)

    def loss(key, batch):
        rngs = {"params": key, **random_streams(config, 0)}
        params = model.init(rngs, model.example_input(config.seq_len))["params"]
        with nn.intercept_methods(_noting(note)):
            return make_loss(model, config)(unbox(params), batch, None, rngs)

    jax.eval_shape(loss, jax.random.key(0), batch)
    rows = [("call", "module", "in", "out"), *((*call, *shapes) for call, shapes in calls.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _shapes(tree: Any) -> str:
    """Such as `4x256x128 bfloat16`, of the array or the first few arrays of a tree."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape")]
    texts = [f"{'x'.join(map(str, leaf.shape)) or 'scalar'} {leaf.dtype}" for leaf in arrays]
    return ", ".join(texts[:3]) + (f", {len(texts) - 3} more" if len(texts) > 3 else "")


def _noting(note: Callable[[str, nn.Module, tuple, Any], None]) -> Callable:
    """An interceptor that tells `note` of each call of a module's public method, when it returns.

    If a method returns a function of the module, as `unembedding` does, `note` hears of the calls of that function.
    """

    def interceptor(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        result = call(*args, **kwargs)
        name = context.method_name
        if name == "__call__" or (not name.startswith("_") and name not in ("setup", "init_state")):
            path = ("/".join(context.module.path) or "model") + ("" if name == "__call__" else f".{name}")
            if isinstance(result, Partial):
                return _noted(result, lambda *heard: note(path, context.module, *heard))
            note(path, context.module, (args, kwargs), result)
        return result

    return interceptor


def _noted(function: Partial, note: Callable[[tuple, Any], None]) -> Partial:
    """The function, which tells `note` of each call's arguments and result. Its own arrays are not among them."""

    def run(*arguments: Any) -> Any:
        result = function.func(*arguments, **function.keywords)
        note(arguments[len(function.args) :], result)
        return result

    return Partial(run, *function.args)


# The first value that is not finite


def first_not_finite(model: nn.Module, config: ConfigDict, state: TrainState, batch: dict[str, np.ndarray]) -> str:
    """Where in the step that follows `state` a NaN or an infinity comes up first, in words.

    Looks through the parameters, then the outputs of all modules in the order in which they are computed, then the
    gradients. That is done on one device, without scan over blocks, outside of `jit`, where every module's output can
    be seen; so it takes the memory of the whole model there. With dropout under `scan_blocks` the random numbers differ
    from those of the step.

    Args:
      state: before the step, as `training.nan="stop"` keeps it.
      batch: of the step.
    """
    if jax.process_count() > 1:
        return "where, only a run in one process can say"
    here = jax.local_devices()[0]
    params, carry = jax.device_put(jax.device_get((state.params, state.carry)), here)
    with jax.set_mesh(Mesh(np.array([here]).reshape((1,) * len(AXES)), AXES)), nn.logical_axis_rules(()):
        for name, leaf in _flat(unstack(params)):
            if bad := _bad(leaf):
                return f"the first is in a parameter, {name}: {bad}"
        pieces = config.training.accumulate
        batch, carry = split_rows((jax.tree.map(jnp.asarray, batch), carry), pieces)
        for i in range(pieces):
            rows, rows_carry = jax.tree.map(lambda x, i=i: x[i], (batch, carry))
            rngs = random_streams(config, int(state.step))
            if pieces > 1:
                rngs["dropout"] = jax.random.fold_in(rngs["dropout"], i)
            if found := _in_forward(model, config, params, rows, rows_carry, rngs) or _in_backward(
                model, config, params, rows, rows_carry, rngs
            ):
                return found
    return "one operation at a time, everything is finite: only the compiled step goes wrong"


def _in_forward(model, config, params, rows, carry, rngs) -> str:
    """The first module whose output is not finite, or the loss; "" if there is none."""
    plain = ConfigDict(model.config.to_dict())
    plain.update(scan_blocks=0, remat="none", remat_blocks=0)
    model = model.clone(config=FrozenConfigDict(plain))
    found: list[str] = []

    def note(path: str, module: nn.Module, arguments: tuple, result: Any) -> None:
        if found or any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(result)):
            return  # a tracer: the module was called within a loop of the loss
        if bad := next(filter(None, map(_bad, jax.tree.leaves(result))), ""):
            found.append(f"the first is in the output of {path} ({type(module).__name__}): {bad}")

    with nn.intercept_methods(_noting(note)):
        total, _ = make_loss(model, config)(unstack(params), rows, _unstack_states(carry), rngs)
    if found:
        return found[0]
    if bad := _bad(total):
        return f"the first is in the loss, while the output of every module is finite: {bad}"
    return ""


def _in_backward(model, config, params, rows, carry, rngs) -> str:
    """The block nearest the loss with a gradient that is not finite; "" if there is none."""
    gradients, _ = jax.jit(jax.grad(make_loss(model, config), has_aux=True))(params, rows, carry, rngs)
    names = {name: bad for name, leaf in _flat(unstack(gradients)) if (bad := _bad(leaf))}
    if not names:
        return ""
    name = max(names, key=_depth)  # the backward pass goes from the last block to the first
    alike = [other for other in names if _depth(other) == _depth(name)]
    return (
        "the forward pass is finite; of the backward pass, which goes from the last block to the first, the first is "
        f"in the gradient of {', '.join(alike[:4])}: {names[name]}"
    )


def _depth(name: str) -> float:
    """Number of a parameter's block; what comes after the blocks counts as the last, the embedding as the first."""
    first = name.split("/")[0]
    if first.startswith("block_"):
        return int(first.removeprefix("block_"))
    return np.inf if first in ("final_norm", "head", *HEADS) else -1


def _unstack_states(carry: Any) -> Any:
    """The states of blocks under a scan, [B, repeats, ...], as those of unrolled blocks."""
    if carry is None or "blocks" not in carry["layers"]:
        return carry
    layers = dict(carry["layers"])
    stacked = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), layers.pop("blocks"))
    return {**carry, "layers": unstack({**layers, "blocks": stacked})}


def _flat(params: Any) -> Iterator[tuple[str, jax.Array]]:
    """Names and leaves of a tree of parameters."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        yield "/".join(str(key.key) for key in path), leaf


def _bad(leaf: Any) -> str:
    """Such as "3 of 128 values are nan"; "" if all are finite or no numbers."""
    if not jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact):
        return ""
    values = np.asarray(leaf, np.float32)
    if np.isfinite(values).all():
        return ""
    counts = {"nan": np.isnan(values).sum(), "infinite": np.isinf(values).sum()}
    return " and ".join(f"{count} of {values.size} values are {kind}" for kind, count in counts.items() if count)
