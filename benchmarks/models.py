r"""Times training steps of a config on random tokens, and keeps the figures.

    python benchmarks/models.py --config=configs/mamba.py:130m --config.batch_size=8 --config.seq_len=2048
    python benchmarks/models.py --config=configs/mamba.py --config.batch_size=2 --config.seq_len=512 \
        --config.model.vocab_size=256

Whole steps: forward, backward, optimizer, with the state donated, as train.py runs them. Each figure is the median over
--repeats timings of --steps steps each, after compiling and a warm-up. Results go to
benchmarks/results/models_<device>.json, one object for each config, batch and length; a new figure takes the place of
an old one.
"""

import datetime
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from benchmarks.record import RESULTS, commit, device_name, record, slug
from seqmodels import cli


def define(flag_values: flags.FlagValues, argv: list[str]) -> None:
    cli.define_config(flag_values, argv)
    flags.DEFINE_integer("steps", 5, "Steps of one timing.", flag_values=flag_values)
    flags.DEFINE_integer("repeats", 5, "Timings, of which the median counts.", flag_values=flag_values)
    flags.DEFINE_string("label", "", "Name of the result; the config's path if left out.", flag_values=flag_values)
    flags.DEFINE_string("out", "", "File of results; by device if left out.", flag_values=flag_values)


def main(flag_values: flags.FlagValues) -> None:
    config = flag_values.config
    cli.use_platform(config.platform)
    result = measure(config, flag_values.steps, flag_values.repeats)
    result = dict(config=flag_values.label or config.name, **result)
    path = Path(flag_values.out or RESULTS / f"models_{slug(result['device'])}.json")
    record(path, result, key=("config", "batch", "length", "device"))
    print(json.dumps(result, indent=2))


def measure(config, steps: int, repeats: int) -> dict:
    """Seconds a step, tokens/s, MFU and peak memory of `config` on the devices at hand."""
    import jax
    import numpy as np
    from flax import linen as nn

    from seqmodels.config import validate
    from seqmodels.model import build
    from seqmodels.training import flops, sharding
    from seqmodels.training.optimizer import decay_mask, make_optimizer, make_schedule
    from seqmodels.training.state import abstract_params, abstract_state, init_state
    from seqmodels.training.step import lower_train_step, make_train_step

    validate(config)
    mesh = sharding.make_mesh(config)
    model = build(config.model, config.model.vocab_size or 257)
    boxed = abstract_params(model, config)
    optimizer = make_optimizer(config.optimizer, decay_mask(boxed))
    abstract = abstract_state(model, optimizer, config, mesh)
    draw = np.random.default_rng(0)
    shape = (config.batch_size, config.seq_len)

    def batch():
        tokens = draw.integers(0, config.model.vocab_size or 257, shape, dtype=np.int32)
        rows = dict(tokens=tokens, targets=np.roll(tokens, -1, 1), segment_ids=np.zeros(shape, np.int32))
        return sharding.put_batch(rows, mesh)

    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        train_step = make_train_step(model, optimizer, make_schedule(config.optimizer, config.steps), config)
        start = time.perf_counter()
        compiled = lower_train_step(train_step, abstract, config, mesh).compile()
        compile_seconds = time.perf_counter() - start
        state = init_state(model, optimizer, config, abstract)
        batches = [batch() for _ in range(steps)]
        state, metrics = compiled(state, batches[0])
        first_loss = float(metrics["loss"])
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for rows in batches:
                state, metrics = compiled(state, rows)
            jax.block_until_ready((state, metrics))
            times.append((time.perf_counter() - start) / steps)
    device = mesh.devices.flat[0]
    seconds = statistics.median(times)
    peak = flops.peak_flops(device.device_kind, config.model.dtype)
    operations = flops.train_step_flops(boxed, config)
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return dict(
        batch=config.batch_size,
        length=config.seq_len,
        tokens_per_second=round(config.batch_size * config.seq_len / seconds, 1),
        ms_per_step=round(seconds * 1e3, 3),
        mfu=round(operations / seconds / (peak * mesh.size), 4) if peak else None,
        peak_gib=round(memory / 2**30, 2) if memory else None,
        temporary_gib=round(compiled.memory_analysis().temp_size_in_bytes / 2**30, 3),
        compile_seconds=round(compile_seconds, 1),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(abstract.params)),
        dtype=config.model.dtype,
        remat=config.model.remat,
        scan_blocks=config.model.scan_blocks,
        loss=[round(first_loss, 4), round(float(metrics["loss"]), 4)],
        device=device_name(device),
        devices=mesh.size,
        jax=jax.__version__,
        date=datetime.date.today().isoformat(),
        commit=commit(),
    )


if __name__ == "__main__":
    sys.exit(cli.run(main, define, __doc__))
