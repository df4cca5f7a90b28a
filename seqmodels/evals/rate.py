"""Another sampling rate: one sample in r is read, and the model is told so by `model.rescale`, without new training.

A state space model has a step size, so it can follow signals at a rate that it was not trained at (Gu et al. 2022,
arXiv 2111.00396, section 4.3; Smith et al. 2023, S5). What counts samples, such as Mamba's short convolution, cannot.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from seqmodels.data.contract import FIGURES, Batch, BatchSplit
from seqmodels.errors import UserError
from seqmodels.evals import figures
from seqmodels.evals.run import Run, RunData
from seqmodels.model import check_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OVER_TIME = ("values", "mask", "segment_ids", "observed")  # arrays [B, T, ...] of a batch
HELD = ("values", "observed")  # of these, what a sample says
TAPS = 8  # of the low pass, on each side, in samples of the lower rate


def serves(run: RunData) -> bool:
    """Whether rows are signals, at equal distances in time, from which one prediction is made."""
    return run.dataset.measured_by == "head" and run.dataset.evenly_sampled


def check(config: ConfigDict) -> None:
    """Raises UserError for a model that cannot read at another rate."""
    check_time(config.model, "--evals=rate", ("rate", "token"))
    for rate in config.evaluation.rates:
        if config.model.input == "patches" and -(-config.seq_len // rate) % config.model.patch:
            raise UserError(
                f"config.evaluation.rates={rate}: must leave a number of samples that model.patch={config.model.patch} "
                f"divides, of config.seq_len={config.seq_len}"
            )


def low_pass(values: np.ndarray, rate: int) -> np.ndarray:
    """values [T, C] without frequencies that one sample in `rate` cannot show, in float32.

    A sinc under a Hann window, of zero phase. At the ends the weights of the samples that there are count.
    """
    place = np.arange(-TAPS * rate, TAPS * rate + 1)
    taps = np.sinc(place / rate) * np.hanning(len(place))
    taps /= taps.sum()
    inside = slice(TAPS * rate, TAPS * rate + len(values))
    total = np.stack([np.convolve(channel, taps)[inside] for channel in values.T.astype(np.float64)], axis=1)
    weight = np.convolve(np.ones(len(values)), taps)[inside]
    return (total / weight[:, None]).astype(np.float32)


def smoothed(batch: Batch, rate: int) -> np.ndarray:
    """The values of a batch [B, T, C], of each document by itself behind a low pass; padding is as it was."""
    values = batch["values"].copy()
    mask = batch.get("mask", np.ones(values.shape[:2], bool))
    ids = batch.get("segment_ids", np.zeros(values.shape[:2], np.int32))
    for row, real in enumerate(mask):
        for document in np.unique(ids[row, real]):
            here = np.flatnonzero(real & (ids[row] == document))
            values[row, here] = low_pass(values[row, here], rate)
    return values


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A split of which one sample in `rate` is read.

    Attributes:
        filtered: behind a low pass.
        held: rows keep their length; each sample stands in the place of the next `rate` - 1 too.
    """

    split: BatchSplit
    rate: int
    filtered: bool = False
    held: bool = False

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """See `seqmodels.data.contract.BatchSplit`."""
        for batch in self.split.batches(batch_size, limit):
            if self.filtered:
                batch = batch | dict(values=smoothed(batch, self.rate))
            if self.held:
                yield batch | {name: held(batch[name], self.rate) for name in HELD if name in batch}
            else:
                yield {name: x[:, :: self.rate] if name in OVER_TIME else x for name, x in batch.items()}


def held(x: np.ndarray, rate: int) -> np.ndarray:
    """x [B, T, C] in which every sample is that of the last multiple of `rate`."""
    return x[:, np.arange(x.shape[1]) // rate * rate]


def rescaled(model: Any, rate: float) -> Any:
    """The model for samples that are `rate` times as far apart, for the same parameters."""
    config = ConfigDict(model.config.to_dict())
    config.rescale = float(config.rescale * rate)
    return model.clone(config=FrozenConfigDict(config))


def evaluate_run(run: Run, splits: list[str], limit: int | None) -> dict:
    """Figures of the head by split, rate and way: sampled, filtered before, without telling the model the rate; and of
    the same samples held, at the rate of training, which says how much is lost with the others and not by the step."""
    options = dict(batch_size=run.batch_size, reset=run.config.data.reset, limit=limit, mesh=run.mesh)
    result: dict[str, dict] = {}
    for split in splits:
        rows = run.dataset[split]
        result[split] = {1: {"as trained": figures.evaluate(run.model, run.params, rows, **options)}}
        for rate in run.config.evaluation.rates:
            slower, own = rescaled(run.model, rate), Sampled(rows, rate)
            ways = {
                "sampled": (slower, own),
                "filtered": (slower, Sampled(rows, rate, filtered=True)),
                "not rescaled": (run.model, own),
                "held": (run.model, Sampled(rows, rate, held=True)),
            }
            result[split][rate] = {
                way: figures.evaluate(model, run.params, part, **options) for way, (model, part) in ways.items()
            }
    return {"rate": result}


def table(result: dict) -> str:
    by_split = result["rate"]
    every = [found for by_rate in by_split.values() for ways in by_rate.values() for found in ways.values()]
    shown = [name for name in FIGURES["head"] if all(name in found for found in every)]
    lines = [f"{'split':<12}{'one in':>8}  {'':<14}" + "".join(f"{name:>12}" for name in shown)]
    for split, by_rate in by_split.items():
        for rate, ways in by_rate.items():
            for way, found in ways.items():
                lines.append(f"{split:<12}{rate:>8}  {way:<14}" + "".join(f"{found[name]:>12.4f}" for name in shown))
    return "\n".join(lines)


def plot(axes: "Axes", result: dict) -> None:
    """Accuracy, or the loss, of the first split."""
    split, by_rate = next(iter(result["rate"].items()))
    trained = next(iter(by_rate.values()))["as trained"]
    name = "accuracy" if "accuracy" in trained else "loss"
    ways = dict.fromkeys(way for found in by_rate.values() for way in found if way != "as trained")
    for way in ways:
        points = [(int(rate), found[way][name]) for rate, found in by_rate.items() if way in found]
        axes.plot(*zip((1, trained[name]), *points, strict=True), "o-", label=way)
    axes.legend()
    axes.set(xlabel="one sample in", ylabel=name, title=f"another sampling rate ({split})")
