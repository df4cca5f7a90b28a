"""Speed and memory of training: whole steps, as train.py takes them, on rows of the training split."""

import itertools
import math
import statistics
import time

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqmodels.data.contract import BatchSource
from seqmodels.errors import UserError
from seqmodels.evals import memory
from seqmodels.evals.run import Run, RunData
from seqmodels.training import flops
from seqmodels.training.optimizer import make_optimizer, make_schedule
from seqmodels.training.sharding import put_batch, row_shards
from seqmodels.training.state import abstract_params, abstract_state, init_state
from seqmodels.training.step import lower_train_step, make_train_step

SECONDS = 0.5  # of a timing, at least; a step at least
REPEATS = 5  # timings, of which the median counts
BATCHES = 4  # that are read, and taken in turn


def serves(run: RunData) -> bool:
    """Any run."""
    return True


def measure(config: ConfigDict, model: nn.Module, dataset: BatchSource, mesh: Mesh) -> dict:
    """Figures of a fresh state's steps on a mesh.

    Returns:
      tokens_per_second, step_ms: medians. mfu: model FLOPs utilisation; None on devices that training/flops.py does not
      know. planned_bytes: memory of the step, as the compiler planned it. peak_bytes: most memory that the process has
      used on the first device so far; None on CPUs. compile_seconds: shorter if JAX's cache holds the program.
    """
    boxed = abstract_params(model, config)
    optimizer = make_optimizer(config.optimizer, boxed, make_schedule(config.optimizer, config.steps))
    abstract = abstract_state(model, optimizer, config, mesh)
    train_step = make_train_step(model, optimizer, make_schedule(config.optimizer, config.steps), config, boxed)
    lowered = lower_train_step(train_step, abstract, config, mesh, dataset.spec)
    begun = time.perf_counter()
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - begun
    state = init_state(model, optimizer, config, abstract)
    batches = itertools.cycle([put_batch(dataset.batch(n), mesh) for n in range(BATCHES)])

    def run(steps: int) -> float:
        """Seconds a step."""
        nonlocal state
        begun = time.perf_counter()
        for _ in range(steps):
            state, metrics = compiled(state, next(batches))
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - begun) / steps

    run(1)
    steps = math.ceil(SECONDS / run(2))
    seconds = statistics.median(run(steps) for _ in range(REPEATS))
    device = mesh.devices.flat[0]
    peak = flops.peak_flops(device.device_kind, config.model.dtype)
    return dict(
        tokens_per_second=config.batch_size * config.seq_len / seconds,
        step_ms=1e3 * seconds,
        mfu=flops.train_step_flops(boxed, config) / seconds / (peak * mesh.size) if peak else None,
        planned_bytes=memory.planned_bytes(compiled),
        peak_bytes=memory.peak_bytes(device),
        compile_seconds=compile_seconds,
    )


def evaluate_run(run: Run, splits: list[str], limit: int | None) -> dict:
    """The speed of the run's config on the devices at hand. Raises UserError if its rows cannot be split over them."""
    shares = row_shards(run.mesh.shape) * run.config.training.accumulate
    if run.config.batch_size % shares:
        raise UserError(
            f"config.batch_size={run.config.batch_size}: must be a multiple of {shares} on {run.mesh.size} devices"
        )
    figures = measure(run.config, run.model, run.dataset, run.mesh)
    return {"training": figures, "training_device": f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"}


def table(result: dict) -> str:
    values = result["training"]
    lines = [f"training on {result['training_device']}", f"{values['tokens_per_second']:>12,.0f} tokens a second"]
    lines.append(f"{values['step_ms']:>12,.2f} ms a step")
    if values["mfu"] is not None:
        lines.append(f"{values['mfu']:>12.3f} of the peak's operations (MFU)")
    for name, meaning in (("planned_bytes", "planned"), ("peak_bytes", "at the most")):
        if values[name] is not None:
            lines.append(f"{values[name] / 2**30:>12.3f} GiB {meaning}")
    return "\n".join([*lines, f"{values['compile_seconds']:>12.1f} s of compilation"])
