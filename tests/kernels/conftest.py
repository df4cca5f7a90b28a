"""jax's interpreters of Pallas kernels, for tests on a CPU."""

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from seqmodels.kernels.interpreter import interpret


@pytest.fixture
def gpu_interpreter():
    """Kernels for GPUs run in the interpreter, whose memory starts as NaN; on a GPU they run as they are."""
    if jax.default_backend() == "gpu":
        yield
        return
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("the interpreter of jax 0.10 compiles at every launch, a minute for each gradient")
    with interpret():
        yield


@pytest.fixture
def tpu_interpreter():
    """Kernels for TPUs run in the interpreter, whose memory starts as NaN."""
    pltpu.reset_tpu_interpret_mode_state()
    with interpret():
        yield
