"""The learning rate of each step. Imports no JAX, so that a schedule can be looked at before a run."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict


def warmup_steps(warmup: float, steps: int) -> int:
    """Steps of the warm-up that `optimizer.warmup` asks for: a number above 1, or a share of all steps."""
    return round(warmup if warmup > 1 else warmup * steps)


def rate(config: ConfigDict, steps: int, t: Any, xp: Any = np) -> Any:
    """Learning rate of step t = 0 .. steps - 1. `config` is `config.optimizer`.

    Warm-up of W steps: peak (t + 1) / W. Then with u from 0 at step W to 1 at the last step:
      cosine:   peak (floor + (1 - floor) (1 + cos(pi u)) / 2)
      wsd:      peak, and over the last `decay` of the steps linearly down to peak x floor (Hu et al. 2024)
      constant: peak

    Args:
      t: float array of any shape.
      xp: numpy or jax.numpy, whichever t is an array of.
    """
    warmup = float(warmup_steps(config.warmup, steps))  # no program takes a huge integer
    last, peak, floor = steps - 1, config.learning_rate, config.floor
    if config.schedule == "cosine":
        u = xp.clip((t - warmup) / max(last - warmup, 1), 0, 1)
        share = floor + (1 - floor) * (1 + xp.cos(xp.pi * u)) / 2
    elif config.schedule == "wsd":
        length = max(round(config.decay * steps), 1)
        share = 1 - (1 - floor) * xp.clip((t - (last - length)) / length, 0, 1)
    else:
        share = xp.ones_like(t)
    return peak * share * xp.minimum((t + 1) / max(warmup, 1), 1)
