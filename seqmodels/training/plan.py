"""What a config needs, from shapes alone: parameters, cache and state, checkpoint, training state, operations.

Nothing is allocated and nothing is compiled, so a model of 400 B parameters is planned on a laptop in seconds. The
shapes are those of the model itself, of `init_state` and of the training state: there is no second formula here.
"""

import dataclasses
import math
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from seqmodels import data, depth
from seqmodels.backbone import BlockSpec, branch_of, convolutions, scanned
from seqmodels.backbone import plan as blocks_of
from seqmodels.config import upgrade, validate
from seqmodels.errors import UserError
from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.layers.parameter import declarations
from seqmodels.model import SequenceModel, build_for
from seqmodels.training import checkpoint, flops, sharding
from seqmodels.training.optimizer import make_optimizer
from seqmodels.training.state import TrainState, abstract_params, abstract_state

Path = tuple[Any, ...]  # names from the root of a tree to a leaf

FINGERPRINT = 4  # bytes that a checkpoint keeps for each array


@dataclasses.dataclass
class Row:
    """The share of one kind of branch, or of one part of the model, in all blocks together.

    Attributes:
        blocks: how many blocks have it; 0 for what is no branch.
        parameters, active_parameters: all of them, and those that one token uses.
        kv_cache_bytes, recurrent_state_bytes: of one sequence; see `make_plan`.
    """

    blocks: int = 0
    parameters: int = 0
    active_parameters: int = 0
    kv_cache_bytes: int = 0
    recurrent_state_bytes: int = 0


def make_plan(config: ConfigDict, context: int | None = None, dataset: data.BatchSource | None = None) -> dict:
    """The plan of a config, for JSON. All numbers are integers.

    Args:
        context: tokens of the sequence whose cache and state are counted; None: config.seq_len.
        dataset: your own, which gives the sizes of input and head; None: those of text or of `config.data.task`.

    Returns:
        parameters, active_parameters: of the whole model; active are all but those of experts that a token does not
            use.
        context: in tokens. kv_cache_bytes: of one sequence, the numbers whose count grows with the context (keys and
            values, in model.dtype); recurrent_state_bytes: the numbers whose count does not (float32);
            bookkeeping_bytes: the state's integers, such as the document of each key.
        checkpoint_bytes: of the arrays in one checkpoint, before compression.
        mesh: size of each axis; devices: their product. parameter_bytes_per_device, optimizer_bytes_per_device,
            training_state_bytes_per_device: the last is all that a device holds between two steps.
        tokens_per_step, flops_per_step, flops_per_token, forward_flops_per_token: see `seqmodels.training.flops`; in
            rows of config.seq_len tokens.
        branches: name of each `Row`, and its fields.

    Raises:
        UserError: a config that cannot be trained, or rows that do not divide among the mesh.
    """
    validate(config)
    config = upgrade(config).lock()
    try:
        model = _model_of(config, dataset)
        mesh = sharding.abstract_mesh(config)
        boxed = abstract_params(model, config)
        optimizer = make_optimizer(config.optimizer, boxed)
        state = abstract_state(model, optimizer, config, mesh, boxed)
    except UnsupportedError as error:  # a named kernel that cannot serve these shapes
        raise UserError(f"config.model.implementation.{error}") from error
    context = config.seq_len if context is None else context
    rows, bookkeeping = _rows(model, boxed, context)
    total = {name: sum(getattr(row, name) for row in rows.values()) for name in _names()[1:]}
    forward = flops.forward_flops_per_token(boxed, model.config, config.seq_len)
    return dict(
        name=config.name,
        **total,
        context=context,
        bookkeeping_bytes=bookkeeping,
        dtype=config.model.dtype,
        checkpoint_bytes=_checkpoint_bytes(state),
        mesh=dict(mesh.shape),
        devices=mesh.size,
        parameter_bytes_per_device=_device_bytes(state.params, mesh),
        optimizer_bytes_per_device=_device_bytes(state.opt_state, mesh),
        training_state_bytes_per_device=_device_bytes(state, mesh),
        tokens_per_step=config.batch_size * config.seq_len,
        flops_per_step=round(flops.train_step_flops(boxed, config)),
        flops_per_token=round(3 * forward),
        forward_flops_per_token=round(forward),
        branches={name: dataclasses.asdict(row) for name, row in rows.items()},
    )


def _model_of(config: ConfigDict, dataset: data.BatchSource | None) -> SequenceModel:
    if dataset is not None:
        return build_for(config.model, dataset)
    sizes = dict(seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed)
    return build_for(config.model, data.load_unread(config.data, **sizes))


def _names() -> list[str]:
    return [field.name for field in dataclasses.fields(Row)]


def _rows(model: SequenceModel, boxed: Any, context: int) -> tuple[dict[str, Row], int]:
    """Name and `Row` of every part of the model, and the bytes of the integers in its state."""
    rows: dict[str, Row] = defaultdict(Row)
    specs = _specs(model.config)
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=sharding.is_box)
    for (path, _), leaf in zip(leaves, declarations(boxed), strict=True):
        row = rows[_row_of(model.config, specs, tuple(key.key for key in path))]
        row.parameters += math.prod(leaf.value.shape)
        row.active_parameters += math.prod(leaf.value.shape)
    for spec in blocks_of(model.config):
        for word in spec.names().values():
            rows[word].blocks += 1
            rows[word].active_parameters -= branch_of(model.config, word, parent=None).idle_parameters()
    return dict(rows), _count_state(model, specs, rows, context)


def _specs(config: Any) -> dict[Path, BlockSpec]:
    """The block at each path in the tree of parameters, and in that of states."""
    specs, (unrolled, repeats) = blocks_of(config), scanned(config)
    found: dict[Path, BlockSpec] = {(f"block_{i}",): spec for i, spec in enumerate(specs[:unrolled])}
    if repeats:
        body = specs[unrolled : unrolled + (len(specs) - unrolled) // repeats]
        found |= {("blocks", f"block_{i}"): spec for i, spec in enumerate(body)}
    return found


def _row_of(config: Any, specs: dict[Path, BlockSpec], path: Path) -> str:
    """Name of the row that a leaf of the parameters or of the states belongs to."""
    for depth_of_block in (1, 2):
        spec = specs.get(path[:depth_of_block])
        if spec is not None:
            place = path[depth_of_block]
            if place in convolutions(config, spec):
                return "short_conv"
            return place if place == depth.kind(config) else spec.names().get(place, "norms")
    return "norms" if path[0] in ("embedding_norm", "final_norm") else path[0]


def _count_state(model: SequenceModel, specs: dict[Path, BlockSpec], rows: dict[str, Row], context: int) -> int:
    """Adds the state of one sequence to the rows; returns the bytes of its integers."""
    if not model.causal:  # no state
        return 0

    def leaves(length):
        return jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: model.init_state(1, length)))

    bookkeeping = 0
    for (path, leaf), (_, one), (_, two) in zip(leaves(context), leaves(1), leaves(2), strict=True):
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            bookkeeping += size
            continue
        names = tuple(getattr(key, "key", None) for key in path)  # ("layers", "block_0", "mixer", ...)
        of_head = names[0] == "head"
        row = rows[model.config.head if of_head else _row_of(model.config, specs, names[1:])]
        if one.shape != two.shape:
            row.kv_cache_bytes += size
        else:
            row.recurrent_state_bytes += size
    return bookkeeping


def _checkpoint_bytes(state: TrainState) -> int:
    leaves = [leaf for part in checkpoint.parts_of(state).values() for leaf in jax.tree.leaves(part)]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize + FINGERPRINT for leaf in leaves)


def _device_bytes(tree: Any, mesh: AbstractMesh) -> int:
    """Bytes of a tree of shapes with shardings on one device of the mesh."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def text(plan: dict, assumed: bool) -> str:
    """The plan as a table and lines, with its units.

    Args:
        assumed: whether config.mesh.data is -1, so that the mesh of the plan is an assumption.
    """
    names = _names()
    table = [["branch", *(name.replace("_", " ").replace("kv ", "") for name in names)]]
    for name, row in [*plan["branches"].items(), ("total", {"blocks": 0, **plan})]:
        table.append([name, *(f"{row[each]:,}" if row[each] else "-" for each in names)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], "", *_lines(plan, assumed)])


def _lines(plan: dict, assumed: bool) -> list[str]:
    axes = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1 or axis == "data")
    others = {name: plan[f"{name}_bytes_per_device"] for name in ("parameter", "optimizer")}
    rest = plan["training_state_bytes_per_device"] - sum(others.values())
    lines = [
        f"parameters  {_count(plan['parameters'])}, of which a token uses {_count(plan['active_parameters'])}",
        f"sequence    of {plan['context']:,} tokens: cache {_bytes(plan['kv_cache_bytes'])} in {plan['dtype']}, "
        f"recurrent state {_bytes(plan['recurrent_state_bytes'])}, integers {_bytes(plan['bookkeeping_bytes'])}",
        f"checkpoint  {_bytes(plan['checkpoint_bytes'])}",
        f"mesh        {axes}: {plan['devices']} device{'s' * (plan['devices'] > 1)}",
        f"training    {_bytes(plan['training_state_bytes_per_device'])} a device between steps: parameters "
        f"{_bytes(others['parameter'])}, optimizer {_bytes(others['optimizer'])}, all else {_bytes(rest)}",
        f"compute     {plan['flops_per_step']:.4g} floating-point operations a step of {plan['tokens_per_step']:,} "
        f"tokens, {plan['flops_per_token']:.4g} a token, {plan['forward_flops_per_token']:.4g} of them forward",
    ]
    if assumed:
        note = "mesh.data=-1 was taken as 1, and not as the devices of this machine; data splits no parameters"
        lines.insert(4, " " * 12 + note)
    return lines


def _count(number: int) -> str:
    """`51,570,323,328 (51.57 B)`."""
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number:,} ({number / unit:.2f} {name})"
    return f"{number:,}"


def _bytes(number: int) -> str:
    """`4,294,967,296 bytes (4.00 GiB)`."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number:,} bytes ({number / unit:.2f} {name})"
    return f"{number:,} bytes"
