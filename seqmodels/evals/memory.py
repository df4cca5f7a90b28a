"""Memory that a compiled program needs, and what there is."""

from collections.abc import Callable
from pathlib import Path

import jax

from seqmodels.errors import UserError
from seqmodels.kernels.dispatch import UnsupportedError


def planned_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Bytes on each device that a program needs while it runs, as the compiler planned it; None: not known."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return held + plan.temp_size_in_bytes


def free_host_bytes() -> int | None:
    """Bytes that programs may still take of the host's memory; None where the system does not say (not Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def check(compiled: jax.stages.Compiled, devices: int = 1) -> None:
    """Refuses to run a program that needs more memory than a CPU has: the system would kill the process.

    Nothing is checked on other devices, which raise an error when their memory is full.

    Args:
      devices: how many devices of this host run the program; they share its memory.

    Raises: UserError with what it needs and what is free.
    """
    if jax.default_backend() != "cpu":
        return
    needed, free = planned_bytes(compiled), free_host_bytes()
    needed = needed and needed * devices
    if needed is not None and free is not None and needed > free:
        raise UserError(f"needs {needed / 2**30:,.1f} GiB of memory, {free / 2**30:,.1f} are free; lower --batch_size")


def served(measure: Callable[[], dict]) -> dict:
    """What `measure` returns, or {"not_served": reason} if inputs, kernels or memory do not allow the measurement."""
    try:
        return measure()
    except (UserError, UnsupportedError) as error:
        return {"not_served": str(error)}
    except Exception as error:
        if not exhausted(error):  # any other error is a defect
            raise
        return {"not_served": "out of memory; lower the batch size"}


def exhausted(error: Exception) -> bool:
    """Whether an error says that the memory of a device is full."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def peak_bytes(device: jax.Device) -> int | None:
    """Most bytes that this process ever held on a device; None where it is not counted (CPU)."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")
