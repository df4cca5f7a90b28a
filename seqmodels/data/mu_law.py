"""Mu-law: samples of a wave as 256 ids, finer near zero (WaveNet, SaShiMi). So the next value is a next token."""

import numpy as np

MU = 255


def encode(samples: np.ndarray) -> np.ndarray:
    """Samples [...] between -1 and 1, beyond which they are cut, to ids [...] int32 from 0 to 255."""
    x = np.clip(np.asarray(samples, np.float64), -1, 1)
    pressed = np.sign(x) * np.log1p(MU * np.abs(x)) / np.log1p(MU)
    return np.clip((pressed + 1) / 2 * (MU + 1), 0, MU).astype(np.int32)


def decode(ids: np.ndarray) -> np.ndarray:
    """The middle of the samples [...] float64 that have these ids."""
    pressed = (np.asarray(ids) + 0.5) / (MU + 1) * 2 - 1
    return np.sign(pressed) * np.expm1(np.abs(pressed) * np.log1p(MU)) / MU
