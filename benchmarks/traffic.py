r"""Counts the bytes that a training step moves on a GPU that need not be there, kernel by kernel.

    python benchmarks/traffic.py --rows=130m,130m-attnres,130m-hyper
    python benchmarks/traffic.py --rows=130m-attnres --kernels=30 --fields model.repeats=6
    python benchmarks/traffic.py --streams                     # an MLP of 64 channels in place of each mixer

The rows are those of models.py. The step is compiled ahead of time for an H100 (tests/kernels/h100.pbtxt), which takes
jax's CUDA plug-in. A kernel's bytes are those of its arguments and results, each counted once, so a product or a scan
that reads an array twice counts too little. "streams" counts kernels that touch an array of B x T x D numbers or more.
`ms` is the time of the bytes at --bandwidth, which is a bound: matrix products and scans take longer. Prints only.
"""

import argparse
import collections
import os
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import trace
from benchmarks.models import ROWS

TARGET = Path(__file__).resolve().parents[1] / "tests" / "kernels" / "h100.pbtxt"
WIDTHS = {"pred": 1, "s8": 0, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "after-all", "copy-done"}


def size(shape: str) -> int:
    """Bytes of a shape of HLO, such as f32[8,2048]{1,0}, or of a tuple of shapes; s8 is workspace of a product."""
    total = 0
    for kind, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape):
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        total += count * WIDTHS.get(kind, 4)
    return total


def kernels(hlo: str) -> list[tuple[str, str, int, int]]:
    """(name, meaning, bytes, largest array) of each kernel that the entry and its loops' bodies run."""
    found, sizes = [], {}
    fused = set(re.findall(r"calls=%?([\w.\-]+)", hlo)) | set(re.findall(r"to_apply=%?([\w.\-]+)", hlo))
    computation = ""
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = head[1]
        instruction = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)", line)
        if not instruction or computation in fused:
            continue
        name, shape, operation, operands = instruction.groups()
        sizes[name] = size(shape)
        if operation in FREE or operation == "while":
            continue
        arguments = [sizes.get(operand, 0) for operand in dict.fromkeys(re.findall(r"%([\w.\-]+)", operands))]
        meaning = re.search(r'op_name="([^"]*)"', line)
        largest = max([*arguments, *map(size, re.findall(r"\w+\[[\d,]*\]", shape))], default=0)
        found.append((name, meaning[1] if meaning else "", sum(arguments) + sizes[name], largest))
    return found


def compiled(row: str, fields: list[str], streams: bool = False):
    """The training step of a row, compiled for an H100, and its config. streams: with small MLPs as mixers."""
    import importlib

    import jax
    from flax import linen as nn
    from jax.experimental import topologies

    from seqmodels.config import validate
    from seqmodels.fields.mlp import MLP
    from seqmodels.model import build
    from seqmodels.training import sharding
    from seqmodels.training.optimizer import make_optimizer, make_schedule
    from seqmodels.training.state import abstract_params, abstract_state
    from seqmodels.training.step import lower_train_step, make_train_step

    place, batch, length, options = ROWS[row]
    module, _, preset = Path(place).name.partition(".py")
    config = importlib.import_module(f"seqmodels.configs.{module}").get_config(preset.lstrip(":") or None).unlock()
    given = dict(batch_size=batch, seq_len=length, **{"training.accumulate": 1}, **options)
    if streams:
        del config.model.mamba
        config.model.mlp = MLP.defaults(hidden=64)
        given |= {"model.pattern": "mlp", "model.vocab_size": 256}
    for field in fields:
        name, _, text = field.partition("=")
        given[name] = int(text) if text.lstrip("-").isdigit() else text
    config.update_from_flattened_dict(given)
    validate(config)
    devices = topologies.get_topology_desc(platform="cuda", target_config=TARGET.read_text(), topology="1x1x1").devices
    mesh = sharding.make_mesh(config, list(devices))
    model = build(config.model, config.model.vocab_size)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(sharding.RULES):
        boxed = abstract_params(model, config)
        optimizer = make_optimizer(config.optimizer, boxed)
        abstract = abstract_state(model, optimizer, config, mesh, boxed)
        step = make_train_step(model, optimizer, make_schedule(config.optimizer, config.steps), config, boxed)
        return lower_train_step(step, abstract, config, mesh).compile(), config


def main(options: argparse.Namespace) -> None:
    first = 0.0
    for row in options.rows.split(","):
        start = time.perf_counter()
        program, config = compiled(row, options.fields, options.streams)
        seconds, hlo = time.perf_counter() - start, program.as_text()
        if options.dump:
            Path(options.dump, f"{row}.hlo").write_text(hlo)
        stream = 2 * config.batch_size * config.seq_len * config.model.width
        total, streams, by_meaning = 0, 0, collections.defaultdict(lambda: [0, 0])
        for name, meaning, moved, largest in kernels(hlo):
            total, streams = total + moved, streams + (largest >= stream)
            entry = by_meaning[trace.label(name, meaning)]
            entry[0], entry[1] = entry[0] + 1, entry[1] + moved
        milliseconds, first = total / options.bandwidth / 1e9, first or total / options.bandwidth / 1e9
        memory = program.memory_analysis().temp_size_in_bytes / 2**30
        print(f"{row}: {total / 1e9:.2f} GB, {milliseconds:.2f} ms (+{milliseconds - first:.2f}), {streams} kernels of"
              f" streams, {memory:.1f} GiB of temporaries, compiled in {seconds:.0f} s", flush=True)  # fmt: skip
        for name, (count, moved) in sorted(by_meaning.items(), key=lambda item: -item[1][1])[: options.kernels]:
            print(f"{moved / 1e9:9.3f} GB {count:5d}  {name[:170]}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="130m,130m-attnres,130m-hyper", help="rows of models.py")
    parser.add_argument("--fields", nargs="*", default=[], help="other fields of the config, NAME=VALUE")
    parser.add_argument("--streams", action="store_true", help="small MLPs as mixers: nearly all bytes are of streams")
    parser.add_argument("--kernels", type=int, default=0, help="kinds of kernels that are listed, by bytes")
    parser.add_argument("--bandwidth", type=float, default=4.2, help="of the memory, TB/s: of a copy on an H200")
    parser.add_argument("--dump", default="", help="folder for the compiled programs")
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(parser.parse_args())
