r"""Times the generation of text by configs with random weights, and records the figures.

    python benchmarks/generation.py                              # the rows of ROWS, each in its own process
    python benchmarks/generation.py --rows=130m-1,130m-64
    python benchmarks/generation.py --config=configs/mamba.py:130m --batch=64 --prompt=512 --tokens=128
    python benchmarks/generation.py --config=configs/mamba.py --config.model.vocab_size=256 --prompt=32 --tokens=16

Generation is greedy and works as in `seqmodels.generation.decode`: it reads random prompts into the state, then draws
one token at a time. Each time is the median over --repeats, after one run that compiles. Results are written to
benchmarks/results/generation_<device>.json, one object for each config, batch, prompt and number of new tokens. A new
figure replaces the old one.
"""

import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from benchmarks import trace
from benchmarks.record import RESULTS, commit, device_name, record, slug
from seqmodels import cli
from seqmodels.errors import UserError

# name: config, batch; for one GPU of 80 GB
ROWS = {
    "130m-1": ("configs/mamba.py:130m", 1),
    "130m-64": ("configs/mamba.py:130m", 64),
    "370m-1": ("configs/mamba.py:370m", 1),
    "370m-128": ("configs/mamba.py:370m", 128),
    "1.4b-128": ("configs/mamba.py:1.4b", 128),
    "mamba2-370m-128": ("configs/mamba2.py:370m", 128),
}
SIZES = ("batch", "prompt", "tokens", "repeats")


def define(flag_values: flags.FlagValues, argv: list[str]) -> None:
    if any(word.startswith(("--config", "-config", "--help", "-h")) for word in argv):
        cli.define_config(flag_values, argv)
    flags.DEFINE_string(
        "rows", ",".join(ROWS), "Rows that are measured if there is no --config.", flag_values=flag_values
    )
    flags.DEFINE_integer("batch", 1, "Prompts at once; with --config.", lower_bound=1, flag_values=flag_values)
    flags.DEFINE_integer("prompt", 512, "Tokens of a prompt.", lower_bound=1, flag_values=flag_values)
    flags.DEFINE_integer("tokens", 128, "New tokens for a prompt.", lower_bound=1, flag_values=flag_values)
    flags.DEFINE_integer("repeats", 5, "Timings, of which the median counts.", lower_bound=1, flag_values=flag_values)
    flags.DEFINE_string("out", "", "File of results; by device if left out.", flag_values=flag_values)
    flags.DEFINE_string("profile", "", "Folder for a trace of one run more.", flag_values=flag_values)


def main(flag_values: flags.FlagValues) -> int:
    if "config" not in flag_values:
        return measure_rows(flag_values)
    config = flag_values.config
    cli.use_platform(config.platform)
    result = measure(config, **{name: flag_values[name].value for name in SIZES}, profile=flag_values.profile)
    path = Path(flag_values.out or RESULTS / f"generation_{slug(result['device'])}.json")
    record(path, result, key=("config", "batch", "prompt", "new_tokens", "device"))
    print(json.dumps(result))
    return 0


def measure_rows(flag_values: flags.FlagValues) -> int:
    """Measure each row in a separate process, so that its peak memory is measured separately."""
    rows = flag_values.rows.split(",")
    for row in rows:
        if row not in ROWS:
            raise UserError(f"--rows={row}: there are {', '.join(ROWS)}")
    failed = 0
    for row in rows:
        config, batch = ROWS[row]
        command = [sys.executable, __file__, f"--config={config}", f"--batch={batch}", f"--out={flag_values.out}"]
        command += [f"--{name}={flag_values[name].value}" for name in ("prompt", "tokens", "repeats")]
        command += [f"--profile={flag_values.profile}/{row}"] if flag_values.profile else []
        print(f"{row}:", flush=True)
        failed += subprocess.run(command, env=dict(os.environ)).returncode != 0
    return int(failed > 0)


def measure(config, batch: int, prompt: int, tokens: int, repeats: int, profile: str = "") -> dict:
    """Tokens/s including the prompt's time, milliseconds of the prompt and of each new token, and peak memory.

    Args:
        profile: folder for a trace of one additional run, whose longest kernels are printed. "": no trace.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from seqmodels import generation
    from seqmodels.model import build
    from seqmodels.rounding import rounded
    from seqmodels.training.sharding import unbox

    vocabulary = config.model.vocab_size or 257
    model = build(config.model, vocabulary)
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
    # Not the model's own initialisation, which takes long to compile. The numbers only have to stay finite.
    params = jax.tree.map(
        lambda x: 0.02 * jax.random.normal(next(keys), x.shape) if x.ndim > 1 else jnp.ones(x.shape), shapes
    )
    ids = np.random.default_rng(0).integers(0, vocabulary, (batch, prompt), dtype=np.int32)
    prompts = ids.tolist()
    slots = generation.power_of_two(prompt + tokens)

    def prefill():
        state = generation.fresh_state(model, batch, slots)
        return generation.prefill(model, rounded(model, params)[0], ids, None, state)

    def whole():
        sampling = generation.Sampling(temperature=0.0)
        return generation.decode(model, params, prompts, tokens=tokens, vocab_size=vocabulary, sampling=sampling)

    def seconds(run):
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    compile_seconds = seconds(whole)
    prefill_seconds = statistics.median(seconds(prefill) for _ in range(repeats))
    whole_seconds = statistics.median(seconds(whole) for _ in range(repeats))
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if profile:
        with jax.profiler.trace(profile):
            whole()
        print("\n".join(trace.table(trace.kernel_times(profile, ""), 1, 40)))
    return dict(
        config=config.name,
        batch=batch,
        prompt=prompt,
        new_tokens=tokens,
        tokens_per_second=round(batch * tokens / whole_seconds, 1),
        decode_ms_per_token=round((whole_seconds - prefill_seconds) / tokens * 1e3, 4),
        prefill_ms=round(prefill_seconds * 1e3, 3),
        peak_gib=round(memory / 2**30, 2) if memory else None,
        compile_seconds=round(compile_seconds, 1),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        dtype=config.model.dtype,
        device=device_name(device),
        jax=jax.__version__,
        date=datetime.date.today().isoformat(),
        commit=commit(),
    )


if __name__ == "__main__":
    sys.exit(cli.run(main, define, __doc__))
