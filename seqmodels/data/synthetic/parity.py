"""Parity: is the number of ones odd? The smallest problem with a state that a token inverts."""

import dataclasses

import numpy as np

from seqmodels.data.synthetic.bits import Bits


@dataclasses.dataclass(frozen=True)
class Parity(Bits):
    """The answer is 1 if the number of ones is odd.

    Usual are 3 to 40 bits in training, and up to 256 afterwards (Grazzi et al. 2024).
    """

    def running(self, bits: np.ndarray) -> np.ndarray:
        return np.cumsum(bits, axis=1) % 2
