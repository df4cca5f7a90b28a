"""Runs the Pallas kernels on a CPU, without their accelerator, in jax's interpreters."""

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


# The value of a user context is part of jax's cache key for traced and compiled functions. So a function compiled for a
# device is never reused in the interpreter, nor the reverse.
_current = jax.make_user_context(_Interpreters())


@contextlib.contextmanager
def interpret(**options: Any) -> Iterator[None]:
    """Within this context, Pallas kernels for GPUs and TPUs run in jax's interpreters, on any platform.

    The interpreters are slow but detailed: they model asynchronous copies, barriers and uninitialised memory (as NaN).
    jax 0.10 has no interpreter for GPU kernels; with it, these kernels stay unavailable within this context.

    Args:
        **options: fields of `pltpu.InterpretParams` and `plgpu.InterpretGPUParams`, such as `detect_races=True`.
    """
    gpu = getattr(plgpu, "InterpretGPUParams", None)
    with _current(_Interpreters(gpu and gpu(**options), pltpu.InterpretParams(**options))):
        yield


def gpu_interpreter() -> Any:
    """The argument `interpret` of `plgpu.kernel`: None outside the context `interpret`."""
    return _current.value.gpu


def tpu_interpreter() -> Any:
    """The argument `interpret` of `pl.pallas_call`: False outside the context `interpret`."""
    return _current.value.tpu or False
