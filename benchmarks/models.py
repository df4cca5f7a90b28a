r"""Times training steps of configs on random tokens, and records the figures.

    python benchmarks/models.py                                  # the rows of ROWS, each in its own process
    python benchmarks/models.py --rows=130m,370m --profile=/tmp/profile
    python benchmarks/models.py --config=configs/mamba.py:130m --config.batch_size=8 --config.seq_len=2048
    python benchmarks/models.py --config=configs/mamba.py --config.batch_size=2 --config.seq_len=512 \
        --config.model.vocab_size=256

Steps are complete, as in train.py: forward pass, backward pass and optimizer, with the state donated. Rows compile in
parallel (so their compile_seconds are long), and run one after another. Each figure is the median over --repeats
timings, after compiling and a warm-up; each timing has as many steps as take --seconds. The figures are written to
benchmarks/results/models_<device>.json, one object for each config, batch and length. A new figure replaces the old
one. With --profile, some additional steps are traced, and the kernels that take longest on the device are listed.
"""

import dataclasses
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags
from ml_collections import ConfigDict

from benchmarks import trace
from benchmarks.record import RESULTS, commit, device_name, record, slug
from seqmodels import cli
from seqmodels.errors import UserError

TINY_DEV = {  # the sizes of Jamba's preset of this name
    "model.width": 512,
    "model.repeats": 2,
    "model.vocab_size": 65536,
    "model.attention.heads": 8,
    "model.attention.kv_heads": 2,
    "model.mlp.hidden": 2048,
    "model.moe.hidden": 2048,
    "model.moe.experts": 8,
}
UNROLLED = {"model.scan_blocks": 0, "model.remat": "none"}
# name: config, batch, length, and other fields; for one GPU of 80 GB
ROWS = {
    "130m": ("configs/mamba.py:130m", 8, 2048, {}),
    "370m": ("configs/mamba.py:370m", 8, 2048, {}),
    "1.4b": ("configs/mamba.py:1.4b", 2, 2048, {"model.remat_blocks": 32}),  # the states of 16 layers fit
    "130m-16k": ("configs/mamba.py:130m", 1, 16384, {"training.loss_chunk": 8192}),
    "densemamba-130m": ("configs/densemamba.py:130m", 8, 2048, {}),
    "mamba2-130m": ("configs/mamba2.py:130m", 8, 2048, {}),
    "mamba2-370m": ("configs/mamba2.py:370m", 8, 2048, {}),
    "densemamba-130m-unrolled": ("configs/densemamba.py:130m", 8, 2048, UNROLLED),
    "densemamba-130m-input": ("configs/densemamba.py:130m", 8, 2048, {"model.dense.variant": "input", **UNROLLED}),
    "130m-value": ("configs/mamba.py:130m", 8, 2048, {"model.depth": "value"}),
    "130m-mudd": ("configs/mamba.py:130m", 8, 2048, {"model.depth": "mudd"}),
    "130m-denseformer": ("configs/mamba.py:130m", 8, 2048, {"model.depth": "denseformer"}),
    "130m-attnres": ("configs/mamba.py:130m", 8, 2048, {"model.depth": "attnres"}),
    "130m-attnres-kernel": (
        "configs/mamba.py:130m",
        8,
        2048,
        {"model.depth": "attnres", "model.implementation.attn_residual": "mosaic_gpu"},
    ),
    "130m-attnres-full": ("configs/mamba.py:130m", 8, 2048, {"model.depth": "attnres", "model.attnres.form": "full"}),
    "130m-hyper": ("configs/mamba.py:130m", 8, 2048, {"model.depth": "hyper"}),
    "130m-hyper-kernel": (
        "configs/mamba.py:130m",
        8,
        2048,
        {"model.depth": "hyper", "model.implementation.hyper_connection": "mosaic_gpu"},
    ),
    "130m-hyper-lite": ("configs/mamba.py:130m", 8, 2048, {"model.depth": "hyper", "model.hyper.mixing": "lite"}),
    "130m-hyper-sinkhorn": (
        "configs/mamba.py:130m",
        8,
        2048,
        {"model.depth": "hyper", "model.hyper.mixing": "sinkhorn"},
    ),
    "jamba-tiny-dev": ("configs/jamba.py:tiny-dev", 8, 2048, {"model.remat": "none", "model.scan_blocks": 0}),
    "mixcon-tiny-dev": ("configs/mixcon.py:test", 8, 2048, {"model.dtype": "bfloat16", **TINY_DEV}),
    "mixcon-test": ("configs/mixcon.py:test", 8, 2048, {"model.dtype": "bfloat16"}),
    "130m-262k": ("configs/mamba.py:130m", 1, 262144, {"training.loss_chunk": 16384, "model.remat": "projected"}),
}
PROFILED = 3  # steps of a profile


def define(flag_values: flags.FlagValues, argv: list[str]) -> None:
    if any(word.startswith(("--config", "-config", "--help", "-h")) for word in argv):
        cli.define_config(flag_values, argv)
    flags.DEFINE_string(
        "rows", ",".join(ROWS), "Rows that are measured if there is no --config.", flag_values=flag_values
    )
    flags.DEFINE_float("seconds", 1.0, "Time of one timing, at least; a step at least.", flag_values=flag_values)
    flags.DEFINE_integer("repeats", 5, "Timings, of which the median counts.", flag_values=flag_values)
    flags.DEFINE_string("label", "", "Name of the result; the config's if left out.", flag_values=flag_values)
    flags.DEFINE_boolean(
        "turn", False, "Wait for a line of input between compiling and running.", flag_values=flag_values
    )
    flags.DEFINE_string("out", "", "File of results; by device if left out.", flag_values=flag_values)
    flags.DEFINE_string("profile", "", "Folder for a trace of some steps more.", flag_values=flag_values)
    flags.DEFINE_integer("kernels", 40, "Kernels that a profile lists.", flag_values=flag_values)


def main(flag_values: flags.FlagValues) -> int:
    options = {name: flag_values[name].value for name in ("seconds", "repeats", "out", "profile", "kernels")}
    if "config" not in flag_values:
        return measure_rows(flag_values.rows.split(","), options)
    config = flag_values.config
    cli.use_platform(config.platform)
    known = {name: options[name] for name in ("seconds", "repeats", "profile", "kernels")}
    result = measure(config, **known, turn=sys.stdin.readline if flag_values.turn else None)
    result = dict(config=flag_values.label or config.name, **result)
    path = Path(options["out"] or RESULTS / f"models_{slug(result['device'])}.json")
    record(path, result, key=("config", "batch", "length", "device"))
    print(json.dumps(result))
    return 0


def measure_rows(rows: list[str], options: dict) -> int:
    """Measure each of ROWS in a separate process, to get its peak memory. All compile at once, then run in turn."""
    processes = []
    for row in rows:
        if row not in ROWS:
            raise UserError(f"--rows={row}: there are {', '.join(ROWS)}")
    for row in rows:
        config, batch, length, fields = ROWS[row]
        fields = {"batch_size": batch, "seq_len": length, "training.accumulate": 1, **fields}
        command = [sys.executable, __file__, f"--config={config}"]
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        named = {"model.depth", "model.width", "model.dense.variant", "model.scan_blocks"}
        if named & fields.keys():  # the config has the name of another model
            command += [f"--label={'mamba-' + row if row.startswith('130m') else row}"]
        command += [f"--{name}={value}" for name, value in options.items() if name != "profile"]
        command += [f"--profile={options['profile']}/{row}"] if options["profile"] else []
        # The longest rows need this share of the GPU's memory, and no row may allocate it before its turn
        memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        processes.append(subprocess.Popen([*command, "--turn"], env={**memory, **os.environ}, stdin=subprocess.PIPE))
    for row, process in zip(rows, processes, strict=True):
        print(f"{row}:", flush=True)
        process.communicate(b"\n")
    return int(any(process.returncode for process in processes))


@dataclasses.dataclass
class Step:
    """A compiled training step of a config, with a fresh state.

    Attributes:
        run: runs so many steps on random tokens, and returns the seconds of one.
        loss: float() of it is the newest loss.
    """

    run: Callable[[int], float]
    loss: Callable[[], float]
    compiled: Any
    compile_seconds: float
    boxed: Any
    devices: list


def prepare(config: ConfigDict, turn: Callable[[], object] | None = None) -> Step:
    """Compile a training step of `config` for the available devices, make its state, and run one step.

    Args:
        turn: called when everything is compiled; returns when this process may use the device.
    """
    import jax
    import numpy as np
    from flax import linen as nn

    from seqmodels.config import validate
    from seqmodels.model import build
    from seqmodels.training import sharding
    from seqmodels.training.optimizer import make_optimizer, make_schedule
    from seqmodels.training.state import abstract_params, abstract_state, lower_init
    from seqmodels.training.step import lower_train_step, make_train_step

    validate(config)
    mesh = sharding.make_mesh(config)
    model = build(config.model, config.model.vocab_size or 257)
    boxed = abstract_params(model, config)
    optimizer = make_optimizer(config.optimizer, boxed)
    abstract = abstract_state(model, optimizer, config, mesh)
    draw = np.random.default_rng(0)
    shape = (config.batch_size, config.seq_len)

    def batch():
        tokens = draw.integers(0, config.model.vocab_size or 257, shape, dtype=np.int32)
        rows = dict(tokens=tokens, targets=np.roll(tokens, -1, 1), segment_ids=np.zeros(shape, np.int32))
        return sharding.put_batch(rows, mesh)

    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        train_step = make_train_step(model, optimizer, make_schedule(config.optimizer, config.steps), config, boxed)
        start = time.perf_counter()
        compiled = lower_train_step(train_step, abstract, config, mesh).compile()
        compile_seconds = time.perf_counter() - start
        init = lower_init(model, optimizer, config, abstract).compile()
    if turn:
        turn()
    state = init(jax.random.key(config.seed))
    batches = [batch() for _ in range(4)]
    state, metrics = compiled(state, batches[0])

    def run(steps: int) -> float:
        nonlocal state, metrics
        start = time.perf_counter()
        for n in range(steps):
            state, metrics = compiled(state, batches[n % len(batches)])
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - start) / steps

    return Step(run, lambda: float(metrics["loss"]), compiled, compile_seconds, boxed, list(mesh.devices.flat))


def measure(
    config: ConfigDict,
    seconds: float,
    repeats: int,
    profile: str = "",
    kernels: int = 40,
    turn: Callable[[], object] | None = None,
) -> dict:
    """Seconds per step, tokens/s, MFU and peak memory of `config` on the available devices.

    Args:
        seconds: least duration of each of `repeats` timings.
        profile: folder for a trace of some additional steps, whose `kernels` longest kernels are printed. "": no trace.
        turn: see `prepare`.
    """
    import jax

    from seqmodels.training import flops

    step = prepare(config, turn)
    first_loss, device = step.loss(), step.devices[0]
    steps = math.ceil(seconds / step.run(2))
    times = [step.run(steps) for _ in range(repeats)]
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if profile:
        with jax.profiler.trace(profile):
            step.run(PROFILED)
        print("\n".join(trace.table(trace.kernel_times(profile, step.compiled.as_text()), PROFILED, kernels)))
    step_seconds = statistics.median(times)
    peak = flops.peak_flops(device.device_kind, config.model.dtype)
    operations = flops.train_step_flops(step.boxed, config)
    return dict(
        batch=config.batch_size,
        length=config.seq_len,
        tokens_per_second=round(config.batch_size * config.seq_len / step_seconds, 1),
        ms_per_step=round(step_seconds * 1e3, 3),
        mfu=round(operations / step_seconds / (peak * len(step.devices)), 4) if peak else None,
        peak_gib=round(memory / 2**30, 2) if memory else None,
        temporary_gib=round(step.compiled.memory_analysis().temp_size_in_bytes / 2**30, 3),
        compile_seconds=round(step.compile_seconds, 1),
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(step.boxed)),
        dtype=config.model.dtype,
        remat=config.model.remat,
        scan_blocks=config.model.scan_blocks,
        loss=[round(first_loss, 4), round(step.loss(), 4)],
        device=device_name(device),
        devices=len(step.devices),
        jax=jax.__version__,
        date=datetime.date.today().isoformat(),
        commit=commit(),
    )


if __name__ == "__main__":
    sys.exit(cli.run(main, define, __doc__))
