"""Parity: is the number of ones odd? The smallest problem that needs a state which a token turns around."""

import dataclasses

import numpy as np

from seqmodels.data.synthetic.bits import Bits


@dataclasses.dataclass(frozen=True)
class Parity(Bits):
    """1 where the number of ones is odd. Usual: 3 to 40 bits in training, up to 256 afterwards (Grazzi et al. 2024)."""

    def running(self, bits: np.ndarray) -> np.ndarray:
        return np.cumsum(bits, axis=1) % 2
