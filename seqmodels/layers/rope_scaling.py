"""Rotary frequencies for rows that are longer than those of training: train short, test long.

A method changes only numbers that are not trained, so it can be switched on for a trained model. Letters: L trained
length in tokens, s factor by which rows are longer, d channels of a head, f_i = theta^(-2i/d) frequencies in radians a
token, for i < d/2. All functions are plain NumPy in float64, as nothing here depends on the data.
"""

import math

import numpy as np

ROTATIONS_KEPT, ROTATIONS_STRETCHED = 32.0, 1.0  # YaRN's beta and alpha, for Llama (section 3.2)
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0  # Llama 3.1: wavelengths a trained row, below and above which f is stretched, kept


def frequencies(pairs: int, theta: float) -> np.ndarray:
    """f [d/2] (Su et al. 2021, arXiv 2104.09864)."""
    return theta ** (-np.arange(pairs) / pairs)


def linear(pairs: int, theta: float, factor: float) -> np.ndarray:
    """f / s: position interpolation (Chen et al. 2023, arXiv 2306.15595), as positions p/s have the same angles."""
    return frequencies(pairs, theta) / factor


def ntk(pairs: int, theta: float, factor: float) -> np.ndarray:
    """theta s^(d/(d-2)) in place of theta: the slowest pair turns s times slower, the fastest as before (bloc97 2023).

    pairs is at least 2.
    """
    return frequencies(pairs, theta * factor ** (pairs / (pairs - 1)))


def dynamic_factor(length: float, trained: float, strength: float = 1.0) -> float:
    """The factor s of `ntk` for a row of this length: strength n/L - (strength - 1), and 1 up to the trained length.

    This is dynamic NTK (emozilla 2023): short rows stay as they were in training.
    """
    return max(strength * length / trained - (strength - 1), 1.0)


def yarn(pairs: int, theta: float, factor: float, trained: float) -> np.ndarray:
    """Pairs with many rotations in L tokens keep f, those with few get f / s, and there is a ramp between them.

    NTK by parts (Peng et al. 2023, arXiv 2309.00071, section 3.2), with the ramp over i of the authors' code and of
    transformers, whose ends are rounded outwards.
    """
    f, d = frequencies(pairs, theta), 2 * pairs

    def pair_of(rotations: float) -> float:  # i, as a real number, of the pair that turns so often in L tokens
        return d * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair_of(ROTATIONS_KEPT)), 0), min(math.ceil(pair_of(ROTATIONS_STRETCHED)), d - 1)
    ramp = np.clip((np.arange(pairs) - low) / (high - low if high != low else 1e-3), 0, 1)
    return f * (1 - ramp) + f / factor * ramp


def yarn_scale(factor: float) -> float:
    """0.1 ln s + 1, a factor of queries and of keys, so that logits get its square (YaRN, section 3.4)."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def llama3(pairs: int, theta: float, factor: float, trained: float) -> np.ndarray:
    """As `yarn`, but the ramp is linear in the rotations L f / 2 pi, from 1 to 4 of them (Llama 3.1)."""
    f = frequencies(pairs, theta)
    rotations = trained * f / (2 * math.pi)
    kept = np.clip((rotations - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0, 1)
    return f * kept + f / factor * (1 - kept)


def leak(factor: float, trained: float, window: float) -> float:
    """k of Leaky ReRoPE with which the largest distance of rows of s L tokens, w + (s L - w) / k, is L."""
    return (factor * trained - window) / (trained - window)


def frequencies_of(method: str, pairs: int, theta: float, factor: float, trained: float) -> np.ndarray:
    """Frequencies [d/2] of a method by its name; "none", ReRoPE and others that change no frequency: those of training.

    Args:
        factor: s. trained: L, read by `yarn` and `llama3`.
    """
    if method in ("linear", "ntk"):
        return {"linear": linear, "ntk": ntk}[method](pairs, theta, factor)
    if method in ("yarn", "llama3"):
        return {"yarn": yarn, "llama3": llama3}[method](pairs, theta, factor, trained)
    return frequencies(pairs, theta)


def scale_of(method: str, factor: float) -> float:
    """Factor of rotated queries and keys."""
    return yarn_scale(factor) if method == "yarn" else 1.0
