"""Majority: are there more ones than zeros? The model must count; the order does not matter."""

import dataclasses

import numpy as np

from seqmodels.data.synthetic.bits import Bits


@dataclasses.dataclass(frozen=True)
class Majority(Bits):
    """The answer is 1 if more than half of the bits are ones. A tie is 0, as in the Zoology repository."""

    def running(self, bits: np.ndarray) -> np.ndarray:
        return 2 * np.cumsum(bits, axis=1) > np.arange(1, bits.shape[1] + 1)
