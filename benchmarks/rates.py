"""How fast a device is, and how long a call takes on it."""

import math
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

EXPS_PER_SECOND = {  # 16 per clock and multiprocessor, at the clock in the device's description
    "NVIDIA H100 80GB HBM3": 16 * 132 * 1.98e9,
    "NVIDIA H200": 16 * 132 * 1.98e9,
}
FLOPS_PER_SECOND = {  # a product of bfloat16 matrices of 8192 x 8192 reached 704e12
    "NVIDIA H100 80GB HBM3": 700e12,
}


def measure(run: Callable, sets: list, repeat: int, fill: float = 0.03) -> float:
    """Median seconds of a call of `run`. Series of calls of about `fill` seconds are queued, rotating over the sets."""

    def timing(calls: int) -> float:
        start = time.perf_counter()
        for i in range(calls):
            result = run(sets[i % len(sets)])
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    timing(2)
    calls = max(2, min(1000, math.ceil(fill / timing(3))))
    timing(calls)
    return statistics.median(timing(calls) for _ in range(repeat))


def bandwidth(device) -> float:
    """Bytes per second that a copy reads and writes."""
    size = 2**28 if device.platform != "cpu" else 2**25
    sets = [jnp.full(size, i, jnp.float32) for i in range(2)]
    add = jax.jit(lambda x: x + 1)
    return 2 * 4 * size / measure(add, sets, repeat=5)
