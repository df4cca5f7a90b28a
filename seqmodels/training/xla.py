"""Options of the XLA compiler for training steps, by platform: `config.training.xla` adds to them or changes them."""

from typing import Any

import jax
from jax.sharding import Mesh

from seqmodels.errors import UserError
from seqmodels.fields.rules import assignments

ALWAYS: dict[str, dict[str, bool | str | int]] = {
    # Optimization barriers hold until fusion; see kernels.arrays.computed_once
    # Loops over 16 numbers at once where the processor can (AVX-512). By itself LLVM takes 8.
    "cpu": {"xla_disable_hlo_passes": "cse_barrier_expander", "xla_cpu_prefer_vector_width": 512},
    # As calls of cuBLAS products add to what is there already: a gradient's second part to the first. As Triton fusions
    # they leave that sum to a kernel of its own. (benchmarks/notes/model_step.md)
    "gpu": {"xla_gpu_enable_triton_gemm": False},
    "tpu": {},
}
# On several devices: what moves exchanges between devices beside computation. libtpu takes text. For v5p and v6e it
# refuses to compile where asynchronous all-gathers are fused as well (0.0.48: sums might be wrong).
SEVERAL: dict[str, dict[str, bool | str]] = {
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "tpu": {
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
    },
}


def compiler_options(mesh: Mesh, more: str = "") -> dict[str, bool | str | int]:
    """Options for programs on this mesh; `more` is config.training.xla, whose options come last."""
    platform = mesh.devices.flat[0].platform.replace("cuda", "gpu")
    options: dict[str, bool | str | int] = dict(ALWAYS.get(platform, {}))
    if mesh.size > 1:
        options |= SEVERAL.get(platform, {})
    for name, value in (assignments(more) or {}).items():
        if platform == "tpu":
            options[name] = value
        else:
            options[name] = {"true": True, "false": False}.get(value, int(value) if value.isdecimal() else value)
    return options


def compile_step(lowered: Any, more: str) -> Any:
    """The lowered step, compiled. Raises: UserError for an option in `more`, config.training.xla, that XLA refuses."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(": ")[2]
        if more and reason.startswith(("No such compile option", "While setting option")):
            raise UserError(f"config.training.xla={more}: {reason}") from error
        raise


def described(options: dict[str, bool | str | int]) -> str:
    """The options as `name=value`, for the log."""
    return ", ".join(f"{name}={str(value).lower()}" for name, value in options.items())
