"""Accuracy on a synthetic task: how many answers, and how many rows with all their answers, a model gets right."""

import dataclasses
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
from seqmodels.evals.scoring import rows_of, score_long, score_rebuilt
from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.model import head_of
from seqmodels.training.report import state_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PIECE = 2048  # tokens of a row that are read at once
LONG = 8  # rows up to so many times as long as in training are all measured; of longer rows fewer
FEWEST = 32  # rows that are measured at least, of any length
ENOUGH = 0.9  # share of right answers that the horizon asks for
CACHE = 2**14  # longest rows, in tokens, on which attention is measured: its cache and its time grow with them


def serves(run: RunData) -> bool:
    """Whether a run has what this evaluator measures."""
    return run.dataset.measured_by == "accuracy"


def read_rows(
    model: nn.Module, params: Any, batch: dict[str, np.ndarray], *, piece: int, mesh: Mesh | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Reads whole rows, `piece` tokens at a time, so that memory does not grow with their length.

    A model whose head predicts a row behind its end (`rebuild`) reads it in one piece.

    Args:
      batch: tokens, targets, segment_ids [B, T] int32, as a `SyntheticSplit` yields them; and `allowed` [B, T, V] bool,
        if ids beside the target are right.

    Returns:
      nats [B, T] float64, and right [B, T] bool, whether the likeliest token is. Both count only where there is a
      target.
    """
    length = batch["tokens"].shape[1]
    if head_of(model.config).method != "logits":
        nats, best = score_rebuilt(model, params, batch, mesh)
    else:
        end = ((0, 0), (0, -length % piece))  # padding at the end changes no earlier position
        padded = {name: np.pad(batch[name], end) for name in ("tokens", "targets", "segment_ids")}
        nats, best = (x[:, :length] for x in score_long(model, params, padded, piece, mesh))
    if "allowed" not in batch:
        return nats, best == batch["targets"]
    known = best < batch["allowed"].shape[2]  # a padded vocabulary has more ids
    return nats, known & np.take_along_axis(batch["allowed"], np.where(known, best, 0)[..., None], axis=2)[..., 0]


@dataclasses.dataclass
class Tally:
    """Sums over rows of T tokens.

    Attributes:
      asked, right: [T] int, answers by position, and those of them that are right.
      nats: -log p of all answers. entropy: nats of the laws that the answers were drawn from; None: they are certain.
      rows, whole: rows with an answer, and those of them in which every answer is right.
    """

    asked: np.ndarray
    right: np.ndarray
    nats: float = 0.0
    entropy: float | None = None
    rows: int = 0
    whole: int = 0

    @classmethod
    def empty(cls, length: int) -> "Tally":
        return cls(np.zeros(length, np.int64), np.zeros(length, np.int64))

    def add(self, mask: np.ndarray, nats: np.ndarray, right: np.ndarray, allowed: np.ndarray | None = None) -> None:
        """mask, nats, right: [B, T] of a batch. allowed: [B, T, V] bool, ids that were equally likely, if any."""
        real = mask.any(axis=1)
        self.asked += mask.sum(axis=0)
        self.right += (right & mask).sum(axis=0)
        self.nats += float(nats[mask].sum())
        self.rows += int(real.sum())
        self.whole += int((right | ~mask).all(axis=1)[real].sum())
        if allowed is not None:
            self.entropy = (self.entropy or 0.0) + float(np.log(allowed[mask].sum(axis=1)).sum())

    def figures(self) -> dict[str, float | int]:
        """See `evaluate`."""
        answers = int(self.asked.sum())
        figures = dict(
            loss=self.nats / answers,
            accuracy=int(self.right.sum()) / answers,
            sequence_accuracy=self.whole / self.rows,
            answers=answers,
            sequences=self.rows,
        )
        return figures if self.entropy is None else figures | {"kl": (self.nats - self.entropy) / answers}


def evaluate(model: nn.Module, params: Any, split: SyntheticSplit, **options: Any) -> dict[str, float | int]:
    """How well a model answers the rows of a split. Arguments as of `tally`.

    Returns:
      loss: mean nats of an answer. accuracy: share of right answers. sequence_accuracy: share of rows in which every
      answer is right. answers, sequences: numbers of answers and rows. kl, where answers are drawn from a law: nats
      beyond its entropy, an estimate of the divergence from the law to the model.
    """
    return tally(model, params, split, **options).figures()


def tally(
    model: nn.Module,
    params: Any,
    split: SyntheticSplit,
    *,
    length: int,
    batch_size: int,
    limit: int | None = None,
    mesh: Mesh | None = None,
    piece: int | None = None,
) -> Tally:
    """The sums over the rows of a split.

    Args:
      split: a `seqmodels.data.synthetic.dataset.SyntheticSplit`.
      length: T of a row, in tokens.
      batch_size: most rows at once, rounded up to a multiple of the parts that the mesh splits rows into.
      limit: rows to stop after; None is the whole split.
      mesh: devices to spread the rows over.
      piece: tokens of a row read at once; None is the length, at most PIECE.
    """
    piece = piece or min(length, PIECE)
    batch_size = rows_of(min(batch_size, split.count if limit is None else limit), mesh)
    sums = Tally.empty(length)
    for batch in split.windows(length, batch_size, limit):
        sums.add(batch["mask"], *read_rows(model, params, batch, piece=piece, mesh=mesh), batch.get("allowed"))
    return sums


def horizon(tallies: Iterable[Tally]) -> int:
    """The error horizon: so many tokens may be read before fewer than ENOUGH of the answers are right.

    It is found position by position in the rows of all tests together. If nowhere too few are right, it is the number
    of tokens of the longest row.
    """
    tallies = list(tallies)
    length = max(len(one.asked) for one in tallies)
    asked, right = (
        np.sum([np.pad(getattr(one, name), (0, length - len(one.asked))) for one in tallies], axis=0)
        for name in ("asked", "right")
    )
    bad = (asked > 0) & (right < ENOUGH * asked)
    last = np.flatnonzero(asked[: int(np.argmax(bad))] if bad.any() else asked)
    return int(last[-1]) + 1 if len(last) else 0


def evaluate_run(run: Run, splits: list[str], limit: int | None) -> dict:
    """Accuracy of each split at the length of training; for the last also at the task's other lengths or shapes."""
    length, mesh, dataset = run.config.seq_len, run.mesh, run.dataset
    measure = functools.partial(tally, run.model, run.params, batch_size=run.batch_size, mesh=mesh)
    by_split = {split: measure(dataset[split], length=length, limit=limit).figures() for split in splits}
    names = dict.fromkeys(name for figures in by_split.values() for name in figures)
    result: dict[str, Any] = {name: {split: values[name] for split, values in by_split.items()} for name in names}
    result["state_bytes"] = state_bytes(run.model, length)
    if splits and (tests := dataset.task.tests(dataset.lengths)):
        found = {
            name: _measure_test(run, measure, dataset.other(splits[-1], task), n, limit)
            for name, (task, n) in tests.items()
        }
        result["accuracy_by_test"] = {
            name: {"length": tests[name][1]} | ({"not_served": one} if isinstance(one, str) else one.figures())
            for name, one in found.items()
        }
        served = [one for one in found.values() if isinstance(one, Tally)]
        if dataset.task.has_horizon and served:
            result["horizon"] = horizon(served)
    return result


def _measure_test(run, measure, split, length: int, limit: int | None) -> Tally | str:
    """The sums, or why there are none."""
    trained = run.config.seq_len
    if context(run.config) is not None and length > max(CACHE, trained):
        return f"attention's cache: measured up to {CACHE:,} tokens"
    rows = max(min(split.count, FEWEST), min(split.count, split.count * LONG * trained // length))
    rows = rows if limit is None else min(rows, limit)
    try:
        # Few sizes of pieces: one compiled program serves many lengths, with few calls.
        piece = min(trained if length < LONG * trained else LONG * trained, PIECE)
        return measure(split, length=length, limit=rows, piece=piece)
    except (UserError, UnsupportedError) as error:
        return str(error)
    except Exception as error:
        if not memory.exhausted(error):  # any other error is a defect
            raise
        return "out of memory; lower --batch_size"


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
    if "kl" in result:
        lines.append("nats beyond the entropy: " + ", ".join(f"{k} {v:.4f}" for k, v in result["kl"].items()))
    if "horizon" in result:
        lines.append(f"horizon: {result['horizon']:,} tokens, up to which {ENOUGH:.0%} of the answers are right")
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
