"""Running the Pallas kernels without their accelerator, in jax's interpreters, on a CPU."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu


class _Interpreters(NamedTuple):
    """jax's parameters of each interpreter; hashable, since they are part of the keys of jit's caches."""

    gpu: Any = None
    tpu: Any = None


# jax compares the value of a user context when it looks for a function that is traced or compiled already, so what was
# compiled for a device is never taken for what is interpreted, nor the other way round.
_current = jax.make_user_context(_Interpreters())


@contextlib.contextmanager
def interpret(**options: Any) -> Iterator[None]:
    """Within this context, Pallas kernels for GPUs and TPUs run in jax's interpreters, on any platform.

    The interpreters are slow, and exact to the last detail that they model: asynchronous copies, barriers, memory that
    starts as NaN. jax 0.10 has none for GPU kernels; they stay as unavailable there as without this context.

    Args:
        **options: fields of `pltpu.InterpretParams` and `plgpu.InterpretGPUParams`, such as `detect_races=True`.
    """
    gpu = getattr(plgpu, "InterpretGPUParams", None)
    with _current(_Interpreters(gpu and gpu(**options), pltpu.InterpretParams(**options))):
        yield


def gpu_interpreter() -> Any:
    """What `plgpu.kernel(interpret=...)` takes: None outside `interpret`."""
    return _current.value.gpu


def tpu_interpreter() -> Any:
    """What `pl.pallas_call(interpret=...)` takes: False outside `interpret`."""
    return _current.value.tpu or False
