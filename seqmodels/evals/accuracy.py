"""Accuracy on a synthetic task: how many answers, and how many rows with all their answers, a model gets right."""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh

from seqmodels.backbone import context
from seqmodels.data.synthetic.dataset import SyntheticSplit
from seqmodels.errors import UserError
from seqmodels.evals import memory
from seqmodels.evals.run import Run, RunData
from seqmodels.evals.scoring import rows_of, score_long
from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.training.report import state_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PIECE = 2048  # tokens of a row that are read at once
LONG = 8  # rows up to so many times as long as in training are all measured; of longer rows fewer
FEWEST = 32  # rows that are measured at least, of any length
CACHE = 2**14  # longest rows, in tokens, on which attention is measured: its cache and its time grow with them


def serves(run: RunData) -> bool:
    """Whether a run has what this evaluator measures."""
    return run.dataset.measured_by == "accuracy"


def read_rows(
    model: nn.Module, params: Any, batch: dict[str, np.ndarray], *, piece: int, mesh: Mesh | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Reads whole rows, `piece` tokens at a time, so that memory does not grow with their length.

    Args:
      batch: tokens, targets, segment_ids [B, T] int32, as a `SyntheticSplit` yields them.

    Returns:
      nats [B, T] float64, and right [B, T] bool, whether the likeliest token is the target. Both count only where there
      is a target.
    """
    length = batch["tokens"].shape[1]
    end = ((0, 0), (0, -length % piece))  # padding at the end changes no earlier position
    padded = {name: np.pad(batch[name], end) for name in ("tokens", "targets", "segment_ids")}
    nats, best = score_long(model, params, padded, piece, mesh)
    return nats[:, :length], best[:, :length] == batch["targets"]


def evaluate(
    model: nn.Module,
    params: Any,
    split: SyntheticSplit,
    *,
    length: int,
    batch_size: int,
    limit: int | None = None,
    mesh: Mesh | None = None,
    piece: int | None = None,
) -> dict[str, float | int]:
    """How well a model answers the rows of a split.

    Args:
      split: a `seqmodels.data.synthetic.dataset.SyntheticSplit`.
      length: T of a row, in tokens.
      batch_size: most rows at once, rounded up to a multiple of the parts that the mesh splits rows into.
      limit: rows to stop after; None is the whole split.
      mesh: devices to spread the rows over.
      piece: tokens of a row read at once; None is the length, at most PIECE.

    Returns:
      loss: mean nats of an answer. accuracy: share of right answers. sequence_accuracy: share of rows in which every
      answer is right. answers, sequences: numbers of answers and rows.
    """
    piece = piece or min(length, PIECE)
    batch_size = rows_of(min(batch_size, split.count if limit is None else limit), mesh)
    return summarize(
        (batch["mask"], *read_rows(model, params, batch, piece=piece, mesh=mesh))
        for batch in split.windows(length, batch_size, limit)
    )


def summarize(batches: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, float | int]:
    """The figures of `evaluate` from (mask, nats, right) of each batch. Rows without an answer do not count."""
    loss, hits, answers, rows, whole = 0.0, 0, 0, 0, 0
    for mask, nats, right in batches:
        real = mask.any(axis=1)
        loss += float(nats[mask].sum())
        hits += int(right[mask].sum())
        answers += int(mask.sum())
        rows += int(real.sum())
        whole += int((right | ~mask).all(axis=1)[real].sum())
    return dict(
        loss=loss / answers,
        accuracy=hits / answers,
        sequence_accuracy=whole / rows,
        answers=answers,
        sequences=rows,
    )


def evaluate_run(run: Run, splits: list[str], limit: int | None) -> dict:
    """Accuracy of each split at the length of training; for the last also at the task's other lengths or shapes."""
    length, mesh, dataset = run.config.seq_len, run.mesh, run.dataset
    measure = functools.partial(evaluate, run.model, run.params, batch_size=run.batch_size, mesh=mesh)
    by_split = {split: measure(dataset[split], length=length, limit=limit) for split in splits}
    names = ("loss", "accuracy", "sequence_accuracy", "answers", "sequences")
    result: dict[str, Any] = {name: {split: values[name] for split, values in by_split.items()} for name in names}
    result["state_bytes"] = state_bytes(run.model, length)
    if splits and (tests := dataset.task.tests(dataset.lengths)):
        result["accuracy_by_test"] = {
            name: {"length": n} | _measure_test(run, measure, dataset.other(splits[-1], task), n, limit)
            for name, (task, n) in tests.items()
        }
    return result


def _measure_test(run, measure, split, length: int, limit: int | None) -> dict:
    trained = run.config.seq_len
    if context(run.config) is not None and length > max(CACHE, trained):
        return {"not_served": f"attention's cache: measured up to {CACHE:,} tokens"}
    rows = max(min(split.count, FEWEST), min(split.count, split.count * LONG * trained // length))
    rows = rows if limit is None else min(rows, limit)
    try:
        # Few sizes of pieces: one compiled program serves many lengths, with few calls.
        piece = min(trained if length < LONG * trained else LONG * trained, PIECE)
        return measure(split, length=length, limit=rows, piece=piece)
    except (UserError, UnsupportedError) as error:
        return {"not_served": str(error)}
    except Exception as error:
        if not memory.exhausted(error):  # any other error is a defect
            raise
        return {"not_served": "out of memory; lower --batch_size"}


def table(result: dict) -> str:
    lines = [f"{'split':<12}{'accuracy':>12}{'all right':>12}{'nats':>12}{'answers':>12}{'rows':>10}"]
    for split in result["accuracy"]:
        lines.append(
            f"{split:<12}" + _cells({name: values[split] for name, values in result.items() if name in COLUMNS})
        )
    if "accuracy_by_test" in result:
        lines += ["", f"{'test':<12}{'accuracy':>12}{'all right':>12}{'nats':>12}{'answers':>12}{'rows':>10}"]
    for name, values in result.get("accuracy_by_test", {}).items():
        lines.append(f"{name:<12}" + (_cells(values) if "accuracy" in values else f"   {values['not_served']}"))
    return "\n".join([*lines, f"state: {result['state_bytes']:,} bytes a row"])


COLUMNS = ("loss", "accuracy", "sequence_accuracy", "answers", "sequences")


def _cells(values: dict) -> str:
    return (
        f"{values['accuracy']:>12.4f}{values['sequence_accuracy']:>12.4f}{values['loss']:>12.4f}"
        f"{values['answers']:>12,}{values['sequences']:>10,}"
    )


def plot(axes: "Axes", result: dict) -> None:
    tests = {n: values for n, values in result.get("accuracy_by_test", {}).items() if "accuracy" in values}
    if not tests:  # the splits alone
        axes.bar(list(result["accuracy"]), list(result["accuracy"].values()))
    else:
        for name, label in (("accuracy", "answers"), ("sequence_accuracy", "rows, all answers")):
            axes.plot(list(tests), [values[name] for values in tests.values()], "o-", label=label)
        axes.tick_params(axis="x", rotation=45)
        axes.legend()
    axes.set(ylim=(-0.02, 1.02), xlabel="test", ylabel="share that is right", title="accuracy")
