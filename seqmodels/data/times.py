"""Times of samples, and the steps between them that a model is given (`seqmodels.sequence.Sequence.steps`)."""

import numpy as np

from seqmodels.data.contract import Batch


def steps_of(
    times: np.ndarray, segment_ids: np.ndarray | None = None, mask: np.ndarray | None = None, unit: float = 1.0
) -> np.ndarray:
    """[B, T] float32: time from the sample before to each, in units; 1 at the first sample of a document.

    A model that reads backwards (`bi:`) makes the steps of that direction, t_{k+1} - t_k, from these.

    Args:
        times: [B, T] float64 or integers, best not float32, in which the clock of a computer has steps of two minutes.
        segment_ids: [B, T] int, document of each sample. None: one document a row.
        mask: [B, T] bool, False on padding, whose times may be anything. None: every sample is real.
        unit: the time that counts as 1: the median step of the training data, if nothing speaks for another.

    Raises:
        ValueError: a time before that of the sample before it in its document, or a unit that is not above zero.
    """
    if not unit > 0:
        raise ValueError(f"unit={unit}: must be above 0")
    times = np.asarray(times)
    steps = np.ones(times.shape, np.float32)
    for row, own in enumerate(times):
        real = np.arange(own.size) if mask is None else np.flatnonzero(mask[row])
        here, before = real[1:], real[:-1]
        if segment_ids is not None:
            same = segment_ids[row, here] == segment_ids[row, before]
            here, before = here[same], before[same]
        apart = (own[here] - own[before]) / unit
        if not np.all(apart >= 0):
            wrong = here[np.argmin(apart >= 0)]
            raise ValueError(f"times[{row}, {wrong}]={own[wrong]}: must not be below that of the sample before")
        steps[row, here] = apart
    return steps


def at_half_rate(batch: Batch, share: float, rng: np.random.Generator) -> Batch:
    """A batch in which about this share of the rows, drawn, has every second sample only, from the first or second on.

    With `steps` [B, T] float32: 2 in these rows, else 1. Behind their samples, in half of T, is padding.

    Args:
        batch: `mask` [B, T], `values` [B, T, C] and perhaps `observed` [B, T, C]; real samples are at the start of a
            row, one document each. Other arrays stay as they are.
    """
    mask = batch["mask"]
    rows, length = mask.shape
    slow, start = rng.random((rows,)) < share, rng.integers(2, size=(rows,))
    start = np.where(mask.sum(axis=1) > 1, start, 0)  # a row of one sample keeps it
    place = np.where(slow[:, None], 2 * np.arange(length) + start[:, None], np.arange(length))

    def sampled(x: np.ndarray) -> np.ndarray:
        found = x[np.arange(rows)[:, None], np.minimum(place, length - 1)]
        found[place >= length] = 0
        return found

    over_time = {name: sampled(batch[name]) for name in ("values", "mask", "observed") if name in batch}
    steps = np.broadcast_to(np.where(slow, 2, 1)[:, None], mask.shape).astype(np.float32)
    return batch | over_time | {"steps": steps}
