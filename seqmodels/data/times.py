"""Times of samples, and the steps between them that a model is given (`seqmodels.sequence.Sequence.steps`)."""

import numpy as np


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
