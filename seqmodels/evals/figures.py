"""Figures of the model's own head on a split: loss and accuracy of classes, errors of regressions and forecasts.

Beside them stand those of the dataset's simple baselines, which are computed now.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seqmodels.data.contract import FIGURES, BatchSplit
from seqmodels.evals.run import Run, RunData
from seqmodels.evals.scoring import LOGIT_TOKENS, rows_of
from seqmodels.model import head_of, input_of
from seqmodels.training.sharding import put_batch


def serves(run: RunData) -> bool:
    """Whether a run has what this evaluator measures."""
    return run.dataset.measured_by == "head"


@functools.partial(jax.jit, static_argnames=("model", "reset", "mesh"))
def batch_sums(
    model: nn.Module, params: Any, batch: dict[str, jax.Array], reset: bool = True, mesh: Mesh | None = None
) -> Any:
    """The head's sums over a batch, each row from a zero state.

    Args:
      model, params: as in docs/architecture.md; params unboxed.
      batch: arrays as the dataset's spec says, with any number of rows.
      reset: whether `segment_ids`, if the batch has them, keep documents apart (`config.data.reset`).
      mesh: the result is replicated over its devices, so that every process can read it.
    """
    head, variables = head_of(model.config), {"params": params}
    ids = batch.get("segment_ids") if reset else None
    given: dict[str, Any] = {name: batch[name] for name in ("mask", "steps", "observed") if name in batch}
    hidden, _ = model.apply(variables, batch[input_of(model.config).key], segment_ids=ids, **given)
    options = {"chunk": LOGIT_TOKENS} if head.method == "logits" else {}

    def outputs_of(*arguments: Any, method: str = head.method) -> Any:
        return model.apply(variables, *arguments, method=method)

    _, sums = head.loss(outputs_of, hidden, batch, **options)
    if mesh is None:
        return sums
    return jax.lax.with_sharding_constraint(sums, NamedSharding(mesh, PartitionSpec()))


def evaluate(
    model: nn.Module,
    params: Any,
    split: BatchSplit,
    *,
    batch_size: int,
    reset: bool = True,
    limit: int | None = None,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Figures of the head over a split, "loss" first.

    Args:
      split: a `seqmodels.data.contract.BatchSplit`.
      batch_size: rows at once; rounded up to a multiple of what the mesh splits rows into.
      reset: see `batch_sums`.
      limit: rows to stop after; None is the whole split.
      mesh: devices to spread the rows over.
    """
    total = None
    for batch in split.batches(rows_of(batch_size, mesh), limit):
        rows = batch if mesh is None else put_batch(batch, mesh)
        sums = jax.tree.map(float, batch_sums(model, params, rows, reset, mesh))  # added up in double precision
        total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
    head = head_of(model.config)
    figures = {name: float(value) for name, value in head.figures(total).items()}
    return figures | ({"bits": figures["loss"] / math.log(2)} if head.method == "logits" else {})


def evaluate_run(run: Run, splits: list[str], limit: int | None) -> dict:
    """Each figure by split, and with `limit=None` "baselines": name of a baseline -> figure -> split -> value."""
    options = dict(batch_size=run.batch_size, reset=run.config.data.reset, limit=limit, mesh=run.mesh)
    by_split = {split: evaluate(run.model, run.params, run.dataset[split], **options) for split in splits}
    figures: dict[str, Any] = _by_figure(by_split)
    if limit is None:  # a baseline is measured on whole splits
        simple = {split: run.dataset.baselines(split) for split in splits if split != "train"}
        names = dict.fromkeys(name for found in simple.values() for name in found)
        baselines = {name: _by_figure({split: found[name] for split, found in simple.items()}) for name in names}
        figures |= {"baselines": baselines} if baselines else {}
    return figures


def _by_figure(by_split: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """{split: {figure: value}} to {figure: {split: value}}."""
    names = next(iter(by_split.values()), {})
    return {name: {split: values[name] for split, values in by_split.items()} for name in names}


def table(result: dict) -> str:
    shown = [name for name in FIGURES["head"] if name in result]
    rows = {"": result} | result.get("baselines", {})
    lines = [f"{'split':<12}{'':<20}" + "".join(f"{name:>12}" for name in shown)]
    for split in result.get("loss", {}):
        for method, figures in rows.items():
            values = [figures.get(name, {}).get(split) for name in shown]
            if any(value is not None for value in values):
                cells = "".join(f"{'' if value is None else format(value, '.4f'):>12}" for value in values)
                lines.append(f"{split if not method else '':<12}{method or 'the model':<20}{cells}".rstrip())
    return "\n".join(lines)
