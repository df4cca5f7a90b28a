r"""Times a training step on a CPU beside the same model in torch, where torch is installed, and records the figures.

    python benchmarks/cpu_step.py
    python benchmarks/cpu_step.py --rows=transformer,llama --rounds=20

Every model is a process of its own, which compiles and then waits. In each round they run one after the other, so that
what else the machine does meets all of them. A figure is the median over the rounds; a ratio is the median of the
ratios of each round. Steps are complete: forward pass, backward pass, clipping and AdamW, in float32, on random tokens.
`cpu_ms` is the time of a step summed over the cores: it hardly depends on what else runs. Peers that are not installed
are left out: transformers' Llama, mamba.py (PyPI: mambapy), and where that is not there transformers' Mamba without
its CUDA kernels. The figures are written to benchmarks/results/cpu_step_<device>.json, one object for each row.
"""

import datetime
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from benchmarks.record import RESULTS, commit, device_name, record, slug
from seqmodels import cli
from seqmodels.errors import UserError

WIDTH, LAYERS, VOCABULARY = 128, 4, 256
PAUSE = 0.5  # seconds between two models, in which the threads of the first one stop waiting for work


class Row(NamedTuple):
    """A model: of a config of this project, or a peer, made by a function below, whose package must be installed."""

    batch: int
    length: int
    config: str = ""
    peer: str = ""
    package: str = ""


ROWS = {
    "transformer": Row(2, 512, "configs/transformer.py"),
    "llama": Row(2, 512, peer="llama", package="transformers"),
    "mamba": Row(2, 512, "configs/mamba.py"),
    "mamba.py": Row(2, 512, peer="mamba_py", package="mambapy"),
    "mamba in transformers": Row(2, 512, peer="mamba", package="transformers"),
    "mamba-8x256": Row(8, 256, "configs/mamba.py"),
    "densemamba-8x256": Row(8, 256, "configs/densemamba.py"),
}
# name of a ratio: (row, the row that it is divided by, what it should be at least)
RATIOS = {
    "transformer to llama": ("transformer", "llama", 1.0),
    "mamba to mamba.py": ("mamba", "mamba.py", 4.0),
    "mamba to mamba in transformers": ("mamba", "mamba in transformers", None),
    "densemamba to mamba": ("densemamba-8x256", "mamba-8x256", 0.7),
}


def define(flag_values: flags.FlagValues, argv: list[str]) -> None:
    flags.DEFINE_string("rows", "", "Rows, apart by commas; all if left out.", flag_values=flag_values)
    flags.DEFINE_integer("rounds", 15, "Rounds, over which the median is taken.", flag_values=flag_values)
    flags.DEFINE_float("seconds", 1.0, "Time of a row in a round, at least.", flag_values=flag_values)
    flags.DEFINE_string("out", "", "File of results; by device if left out.", flag_values=flag_values)
    flags.DEFINE_string("row", "", "Only this row, which runs for every line of input.", flag_values=flag_values)


def main(flag_values: flags.FlagValues) -> int:
    if flag_values.row:
        serve(ROWS[flag_values.row], flag_values.seconds)
        return 0
    names = [name for name in flag_values.rows.split(",") if name] or installed()
    for name in names:
        if name not in ROWS:
            raise UserError(f"--rows={name}: there are {', '.join(ROWS)}")
    rounds = measure(names, flag_values.rounds, flag_values.seconds)
    for line in report(rounds, flag_values.out):
        print(line)
    return 0


def installed() -> list[str]:
    """The rows whose packages are here. Where mamba.py is, transformers' Mamba is left out, which is slower."""
    packages = {row.package for row in ROWS.values() if row.package}
    here = {name for name in packages if importlib.util.find_spec(name) and importlib.util.find_spec("torch")}
    rows = [name for name, row in ROWS.items() if not row.package or row.package in here]
    return [name for name in rows if not (name == "mamba in transformers" and "mamba.py" in rows)]


def serve(row: Row, seconds: float) -> None:
    """Compile a row, and say so by a line of its facts; then for every line of input a line of figures."""
    run, facts = (ours if row.config else peer)(row)
    steps = max(1, round(seconds / run(3)))
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        before = time.process_time()
        step = run(steps)
        print(json.dumps(dict(ms=1e3 * step, cpu_ms=1e3 * (time.process_time() - before) / steps)), flush=True)


def ours(row: Row) -> tuple[Callable[[int], float], dict]:
    """A function that runs so many steps and returns the seconds of one; and facts of the row."""
    import jax

    from benchmarks.models import prepare

    cli.use_platform("cpu")
    config = cli.load_config(row.config)
    config.batch_size, config.seq_len, config.model.vocab_size = row.batch, row.length, VOCABULARY
    step = prepare(config)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(step.boxed))
    return step.run, dict(parameters=parameters, jax=jax.__version__, device=device_name(step.devices[0]))


def peer(row: Row) -> tuple[Callable[[int], float], dict]:
    """As `ours`, of a model of others in torch."""
    import torch

    torch.manual_seed(0)
    model, logits_of = PEERS[row.peer]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(0, VOCABULARY, (4, row.batch, row.length))

    def step(rows):
        logits = logits_of(rows).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, rows.roll(-1, 1).flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def run(steps):
        start = time.perf_counter()
        for n in range(steps):
            step(tokens[n % len(tokens)])
        return (time.perf_counter() - start) / steps

    parameters = sum(p.numel() for p in model.parameters())
    return run, dict(parameters=parameters, torch=torch.__version__, device=f"cpu {torch.get_num_threads()} cores")


def llama() -> tuple[Any, Callable[[Any], Any]]:
    """transformers' Llama in the sizes of configs/transformer.py: the module, and its logits of tokens [B, T]."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, vocab_size=VOCABULARY, tie_word_embeddings=True)
    sizes |= dict(intermediate_size=176, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    return model, lambda rows: model(rows, use_cache=False).logits


def mamba() -> tuple[Any, Callable[[Any], Any]]:
    """transformers' Mamba in the sizes of configs/mamba.py, which loops over tokens where there are no CUDA kernels."""
    from transformers import MambaConfig, MambaForCausalLM

    sizes = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, vocab_size=VOCABULARY, state_size=16, expand=2)
    model = MambaForCausalLM(MambaConfig(**sizes))
    return model, lambda rows: model(rows, use_cache=False).logits


def mamba_py() -> tuple[Any, Callable[[Any], Any]]:
    """mamba.py in the sizes of configs/mamba.py, with its parallel scan. Its own `lm.py` needs CUDA."""
    import torch
    from mambapy.mamba import Mamba, MambaConfig, RMSNorm

    table = torch.nn.Embedding(VOCABULARY, WIDTH)
    blocks, norm = Mamba(MambaConfig(d_model=WIDTH, n_layers=LAYERS)), RMSNorm(WIDTH, 1e-5, False)
    return torch.nn.ModuleList([table, blocks, norm]), lambda rows: norm(blocks(table(rows))) @ table.weight.T


PEERS = {"llama": llama, "mamba": mamba, "mamba_py": mamba_py}


def measure(names: list[str], rounds: int, seconds: float) -> dict[str, list[dict]]:
    """By row the figures of each round, each with the facts of the row."""
    command = [sys.executable, __file__, f"--seconds={seconds}"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    workers = {name: subprocess.Popen([*command, f"--row={name}"], **pipes) for name in names}
    facts = {name: json.loads(worker.stdout.readline() or "null") for name, worker in workers.items()}
    figures = {name: [] for name, found in facts.items() if found}
    for _ in range(rounds):
        for name in figures:
            time.sleep(PAUSE)
            workers[name].stdin.write("\n")
            workers[name].stdin.flush()
            figures[name].append(facts[name] | json.loads(workers[name].stdout.readline()))
    for worker in workers.values():
        worker.communicate()
    return figures


def report(rounds: dict[str, list[dict]], out: str) -> list[str]:
    """Record the figures, and return the lines of a table, with the ratios behind it."""
    lines = [
        "| row | rows x tokens | parameters | tokens/s | ms a step | CPU ms a step |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, figures in rounds.items():
        row = ROWS[name]
        ms, cpu_ms = (statistics.median(one[key] for one in figures) for key in ("ms", "cpu_ms"))
        speed = 1e3 * row.batch * row.length / ms
        result = dict(
            row=name,
            batch=row.batch,
            length=row.length,
            tokens_per_second=round(speed, 1),
            ms=round(ms, 2),
            cpu_ms=round(cpu_ms, 2),
            rounds=len(figures),
            ratios={key: value for key, value in ratios(rounds).items() if name == RATIOS[key][0]},
            **{key: value for key, value in figures[0].items() if key not in ("ms", "cpu_ms")},
            date=datetime.date.today().isoformat(),
            commit=commit(),
        )
        record(Path(out or RESULTS / f"cpu_step_{slug(result['device'])}.json"), result, key=("row", "device"))
        size = f"{row.batch} x {row.length}"
        lines.append(f"| {name} | {size} | {result['parameters']:,} | {speed:,.0f} | {ms:.1f} | {cpu_ms:.1f} |")
    for name, value in ratios(rounds).items():
        least = RATIOS[name][2]
        lines.append(f"{name}: {value:.2f}" + (f" (at least {least} wanted)" if least else ""))
    return lines


def ratios(rounds: dict[str, list[dict]]) -> dict[str, float]:
    """The ratio of the speeds of two rows, for those pairs of RATIOS that were measured."""
    found = {}
    for name, (row, mark, _) in RATIOS.items():
        if row in rounds and mark in rounds:
            per_round = [b["ms"] / a["ms"] for a, b in zip(rounds[row], rounds[mark], strict=True)]
            found[name] = round(statistics.median(per_round), 3)
    return found


if __name__ == "__main__":
    sys.exit(cli.run(main, define, __doc__))
