r"""Times training steps on meshes of several devices beside one device, and records how near each axis is to its ideal.

    python benchmarks/meshes.py                                   # all rows for two GPUs
    python benchmarks/meshes.py --rows=370m,370m-sequence         # some of them
    python benchmarks/meshes.py --resume --limit=400              # only those that are missing; none begins after 400 s
    python benchmarks/meshes.py --rows=130m-1m --together=1       # rows that need most of a GPU's memory
    python benchmarks/meshes.py --list

A row of a mesh is measured against a row of one device (`against` in ROWS): weak scaling has as many times the tokens,
and its efficiency is tokens/s over devices times those of one; for `tensor`, and for rows of one device, it is the
plain ratio. The row of one device is that of the same run, or of an earlier one at this commit. Rows run each in its
own process; they compile at once, --together of them, and are timed one after another. Figures are as in models.py:
medians over --repeats timings. They are written to benchmarks/results/meshes_<device>.json.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags
from ml_collections import ConfigDict

from benchmarks.models import measure
from benchmarks.record import RESULTS, commit, device_name, record, slug
from seqmodels import cli
from seqmodels.errors import UserError

KEY = ("config", "mesh", "batch", "length", "device")
FIELDS = (
    "config", "mesh", "devices", "batch", "length", "tokens_per_second", "efficiency", "peak_gib", "device", "jax",
    "date", "commit", "ms_per_step", "mfu", "temporary_gib", "compile_seconds", "loss",
)  # fmt: skip


class Row(NamedTuple):
    """A model on a mesh, such as "data=2"; "" is one device. `against`: the row that it is compared with."""

    config: str
    mesh: str
    batch: int
    length: int
    against: str = ""
    fields: Mapping[str, Any] = MappingProxyType({})


LONG = {"training.loss_chunk": 8192}  # tokens whose logits a device has at once: as many as in 8 rows of 1,024
LONG2 = {"training.loss_chunk": 16384}  # the same on each of two
MILLION = {"training.loss_chunk": 16384, "model.remat": "block"}
KEPT = {"model.remat_blocks": 32}  # as in models.py: the states of 16 layers fit
HYBRID = {"model.pattern": "mamba mamba mamba attention+mlp", "model.repeats": 6}
ROWS = {
    "370m": Row("configs/mamba.py:370m", "", 8, 2048),
    "370m-data": Row("configs/mamba.py:370m", "data=2", 16, 2048, "370m"),
    "370m-fsdp": Row("configs/mamba.py:370m", "fsdp=2", 16, 2048, "370m"),
    "370m-tensor": Row("configs/mamba.py:370m", "tensor=2", 8, 2048, "370m"),
    "370m-16k": Row("configs/mamba.py:370m", "", 1, 16384, "370m", LONG),
    "370m-sequence": Row("configs/mamba.py:370m", "sequence=2", 1, 32768, "370m-16k", LONG2),
    "1.4b": Row("configs/mamba.py:1.4b", "", 2, 2048, "", KEPT),
    "1.4b-fsdp": Row("configs/mamba.py:1.4b", "fsdp=2", 4, 2048, "1.4b", KEPT),
    "mamba2-370m-16k": Row("configs/mamba2.py:370m", "", 1, 16384, "", LONG),
    "mamba2-370m-sequence": Row("configs/mamba2.py:370m", "sequence=2", 1, 32768, "mamba2-370m-16k", LONG2),
    "densemamba-130m-16k": Row("configs/densemamba.py:130m", "", 1, 16384, "", LONG),
    "densemamba-130m-sequence": Row("configs/densemamba.py:130m", "sequence=2", 1, 32768, "densemamba-130m-16k", LONG2),
    "hybrid-130m-16k": Row("configs/mamba.py:130m", "", 1, 16384, "", LONG | HYBRID),
    "hybrid-130m-sequence": Row("configs/mamba.py:130m", "sequence=2", 1, 32768, "hybrid-130m-16k", LONG2 | HYBRID),
    "130m": Row("configs/mamba.py:130m", "", 8, 2048),
    "130m-1m": Row("configs/mamba.py:130m", "", 1, 1048576, "130m", MILLION),
    "130m-2m-sequence": Row("configs/mamba.py:130m", "sequence=2", 1, 2097152, "130m-1m", MILLION),
}
TOY = {"model.width": 32, "model.repeats": 1, "model.dtype": "float32", "training.loss_chunk": 8}
TOYS = {  # for eight CPU devices, to test this script
    "toy": Row("configs/mamba.py", "", 1, 16, "", TOY),
    "toy-tensor": Row("configs/mamba.py", "tensor=2", 1, 16, "toy", TOY),
    "toy-sequence": Row("configs/mamba.py", "data=2,sequence=2", 2, 32, "toy", TOY),
}


def define(flag_values: flags.FlagValues, argv: list[str]) -> None:
    values = dict(flag_values=flag_values)
    flags.DEFINE_string("rows", ",".join(ROWS), "Rows that are measured.", **values)
    flags.DEFINE_bool("list", False, "Print the rows and measure nothing.", **values)
    flags.DEFINE_bool("resume", False, "Leave out rows that the file has for this commit.", **values)
    flags.DEFINE_float("limit", 0.0, "Begin no row after so many seconds; 0: no limit.", **values)
    flags.DEFINE_integer("together", 4, "Rows that compile at once.", **values)
    flags.DEFINE_float("seconds", 1.0, "Time of one timing, at least; a step at least.", **values)
    flags.DEFINE_integer("repeats", 5, "Timings, of which the median counts.", **values)
    flags.DEFINE_string("out", "", "File of results; by device if left out.", **values)
    flags.DEFINE_string("one", "", "Measure this row in this process, after a line of input.", **values)


def main(flag_values: flags.FlagValues) -> int:
    if flag_values.list:
        for name, row in ROWS.items():
            print(f"{name:26} {row.config} {row.mesh or 'one device'} {row.batch} x {row.length:,}")
        return 0
    if flag_values.one:
        return measure_one(flag_values)
    names = flag_values.rows.split(",")
    for name in names:
        if name not in ROWS | TOYS:
            raise UserError(f"--rows={name}: there are {', '.join(ROWS)}")
    if flag_values.resume:
        there = {result["row"] for result in recorded(flag_values.out) if result["commit"] == commit()}
        names = [name for name in names if name not in there]
    return run_rows(names, flag_values)


def run_rows(names: list[str], flag_values: flags.FlagValues) -> int:
    """Measure rows one after another, each in its own process; the next ones compile meanwhile."""
    options = [f"--{name}={flag_values[name].value}" for name in ("seconds", "repeats", "out")]
    # The longest rows need this share of a GPU's memory. Of several at once no row may take it before its turn; one
    # alone takes it whole, since memory that grows piece by piece has no place of 114 GiB for a million tokens.
    alone = "true" if flag_values.together == 1 else "false"
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "XLA_PYTHON_CLIENT_PREALLOCATE": alone}
    started, waiting, begun, failed = [], list(names), time.monotonic(), False
    while started or waiting:
        while waiting and len(started) < flag_values.together:
            name = waiting.pop(0)
            command = [sys.executable, __file__, f"--one={name}", *options]
            started.append((name, subprocess.Popen(command, env={**memory, **os.environ}, stdin=subprocess.PIPE)))
        if 0 < flag_values.limit < time.monotonic() - begun:
            for _, process in started:
                process.kill()
            print(f"not begun within {flag_values.limit:.0f} s: {', '.join([n for n, _ in started] + waiting)}")
            break
        name, process = started.pop(0)
        print(f"{name}:", flush=True)
        process.communicate(b"\n")
        failed |= process.returncode != 0
    return int(failed)


def measure_one(flag_values: flags.FlagValues) -> int:
    """Measure a row, record it and print it."""
    name = flag_values.one
    row = (ROWS | TOYS)[name]
    config = config_of(row)
    cli.use_platform(config.platform)
    result = measure(config, flag_values.seconds, flag_values.repeats, turn=sys.stdin.readline)
    out = file_of(flag_values.out)
    result |= dict(config=row.config, mesh=row.mesh or "one", efficiency=None)
    if row.against:
        result["efficiency"] = efficiency(result, row, recorded(out))
    result = {field: result[field] for field in FIELDS} | {"row": name, "against": row.against}
    record(Path(out), result, KEY)
    print(json.dumps(result), flush=True)
    return 0


def config_of(row: Row) -> ConfigDict:
    """The config of a row, with its mesh."""
    config = cli.load_config(row.config)
    if "model.pattern" in row.fields:
        config = cli.with_pattern(config, row.fields["model.pattern"])
    sizes = dict(part.split("=") for part in row.mesh.split(",") if part)
    fields = {"batch_size": row.batch, "seq_len": row.length, "training.accumulate": 1, "mesh.data": 1, **row.fields}
    fields |= {f"mesh.{axis}": int(size) for axis, size in sizes.items()}
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config.lock()


def efficiency(result: dict, row: Row, results: list[dict]) -> float | None:
    """Tokens/s over those of the row that this one is compared with, at this commit; None where there is none."""
    for other in results:
        if other["row"] == row.against and all(other[name] == result[name] for name in ("commit", "device", "jax")):
            strong = row.mesh.startswith("tensor")
            ideal = other["tokens_per_second"] * (1 if strong else result["devices"] / other["devices"])
            return round(result["tokens_per_second"] / ideal, 4)
    return None


def file_of(out: str) -> str:
    """The file of results: `out`, or that of the device."""
    if out:
        return out
    import jax

    return str(RESULTS / f"meshes_{slug(device_name(jax.devices()[0]))}.json")


def recorded(out: str) -> list[dict]:
    """The results in the file, which may not be there yet."""
    path = Path(file_of(out))
    return json.loads(path.read_text()) if path.exists() else []


if __name__ == "__main__":
    sys.exit(cli.run(main, define, __doc__))
