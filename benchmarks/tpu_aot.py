"""Compiles kernels for TPUs that are not available here, and computes a lower bound of their time from the schedule.

    python benchmarks/tpu_aot.py                                   # v5e, v5p, v6e; needs libtpu, no TPU
    python benchmarks/tpu_aot.py --chips=v5e --shapes=8x2048x2048x16:read3 --dtypes=float32
    python benchmarks/tpu_aot.py --op=linear_attention --shapes=8x2048x8x128x256:retention
    python benchmarks/tpu_aot.py --chips=v5e --try=WIDTH=256 --try=TOKENS=64    # prints only

A shape of the selective scan is B x T x E x N, a colon, and "full" (softplus, bias, D, z) or "readG" (the same, with G
groups of states, each with one weight per channel). A shape of linear attention is B x T x H x K x V, a colon, and
"ssd" (one decay per token and head, keys shared by all heads), "retention" (constant decays) or "linear" (no decay), as
in kernels.py. Documents are packed.

libtpu dumps the final bundles of both kernels. A core issues at most one bundle per cycle. So bundles times trips are
the cycles, if nothing ever stalls. Late in compilation, the compiler removes the empty bundles that wait for the
latencies of units; "scheduled" includes these bundles. Neither count includes waits for copies or conflicts in VMEM.

The counts are for one chunk of time. For the selective scan they include the loops, by their trips; the code outside of
loops (less empty bundles), for every block of channels; and once the code that runs only at a chunk's first or last
block. Linear attention has no loops: every step of the grid counts, without the code that only some steps run (state in
and out, products that heads share, starts of copies).

estimated_ms is the larger of two times: of the cycles, and of the bytes of the kernel's arrays, in their layout in HBM,
at its bandwidth. The compiled kernel cannot be faster, but may be slower. floor_ms is the larger of two other times:
of the bytes of the operation's arguments and results, and of the necessary arithmetic. For the selective scan this is
the exponentials, one register of 1024 per cycle; for linear attention it is the matrix products, at the chip's peak. A
v5p counts as two cores, each with half of the batch.

Rows are written to benchmarks/results/<operation>_tpu_aot.json, and replace older rows of the same kind.
"""

import argparse
import contextlib
import datetime
import functools
import glob
import importlib.metadata
import itertools
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",  # do not look for a TPU on the network
    TPU_ACCELERATOR_TYPE="v5litepod-4",  # any type; without one libtpu complains
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # otherwise only one process at a time may compile
    TPU_LOG_DIR="disabled",
)

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks.operations import OPERATIONS
from benchmarks.record import RESULTS, commit, record
from seqmodels.kernels.linear_attention import mosaic_tpu as attention
from seqmodels.kernels.selective_scan import mosaic_tpu as scan
from seqmodels.kernels.selective_scan.mosaic_tpu.tiles import LANES, TILE


class Chip(NamedTuple):
    """A kind of TPU. Flops and bandwidth are the published ones: cloud.google.com/tpu/docs/v5e, v5p and v6e."""

    topology: str
    cores: int
    clock: float  # cycles/s: flops divided by those per cycle of a core's matrix units, 4 x 128 x 128 or 2 x 256 x 256
    flops: float  # bfloat16 flops per second
    bandwidth: float  # bytes/s of HBM
    vmem: int  # bytes per core


CHIPS = dict(
    v5e=Chip("v5e:2x2", 1, 1.5e9, 197e12, 819e9, 128 * 2**20),
    v5p=Chip("v5p:2x2x1", 2, 1.75e9, 459e12, 2765e9, 64 * 2**20),
    v6e=Chip("v6e:2x2", 1, 1.75e9, 918e12, 1640e9, 128 * 2**20),
)
PRODUCTS = dict(bfloat16=1, float16=6, float32=6)  # bfloat16 products for one product with all bits of its factors
KEY = ("op", "implementation", "pass", "chip", "shape", "variant", "dtype", "jax")


class Bundle(NamedTuple):
    """A line of a schedule: its label, the loops around it, the region that it branches past, and its text."""

    label: str
    depth: int
    target: str | None
    text: str


class Case(NamedTuple):
    """An operation at one shape, and how its kernels process it.

    Attributes:
        call: function that computes y and the final state.
        arguments: arrays by name.
        y: shape and dtype of y. The final state has those of the initial state.
        chunk: tokens per chunk.
        block: channels or heads per step of the grid.
        count: maps bundles to those that a chunk of a sequence issues, lengths of loops, and places of the main ones.
        seconds: maps (chip, pass) to the seconds of the necessary arithmetic.
    """

    call: Callable
    arguments: dict
    y: jax.ShapeDtypeStruct
    chunk: int
    block: int
    count: Callable
    seconds: Callable


def arrays(op, variant, sizes, dtype):
    """The arguments of an operation by name."""
    return {
        name: jax.ShapeDtypeStruct(tuple(sizes[a] for a in x.axes), dtype if x.low else jnp.float32)
        for name, x in OPERATIONS[op].arguments(variant).items()
    }


def selective_scan(shape, variant, dtype):
    """The case of B x T x E x N."""
    batch, length, width, state = shape
    groups = 1 if variant == "full" else int(variant.removeprefix("read"))
    sizes = OPERATIONS["selective_scan"].sizes(shape, variant)
    arguments = arrays("selective_scan", "read2", sizes, dtype)  # it has the group axis that the kernels require
    arguments |= dict(weights=arguments["weights"] if groups > 1 else None)
    channels = -(-width // LANES) * LANES
    chunk, block = scan.chunk_tokens(length, groups, state), scan.block_width(channels, groups, state)
    return Case(
        functools.partial(scan.selective_scan, dt_softplus=True),
        arguments,
        arguments["z"],
        chunk,
        block,
        count=lambda bundles: count_loops(bundles, chunk // TILE, channels // block),
        seconds=lambda chip, name: batch * length * groups * width * state / 1024 / chip.clock / chip.cores,
    )


def linear_attention(shape, variant, dtype):
    """The case of B x T x H x K x V."""
    _, _, heads, keys, values = shape
    sizes = OPERATIONS["linear_attention"].sizes(shape, variant)
    arguments = dict(log_decay=None, bonus=None) | arrays("linear_attention", variant, sizes, dtype)
    block, flops = attention.together(heads // sizes["G"], keys, values), attention_flops(sizes, attention.TOKENS)
    return Case(
        functools.partial(attention.linear_attention, scale=1.0, read="inclusive", chunk=None, dtype=dtype),
        arguments,
        arguments["v"],
        attention.TOKENS,
        block,
        count=lambda bundles: count_steps(bundles, heads // block),
        seconds=lambda chip, name: flops[name] * PRODUCTS[dtype.name] / chip.flops,
    )


def attention_flops(sizes, chunk):
    """Flops of the matrix products of each pass, two per multiply-add, as in operations.py for this chunk length."""
    tokens, chunk = sizes["B"] * sizes["T"], min(chunk, sizes["T"])
    scores, values = chunk * sizes["G"] * sizes["K"], chunk * sizes["H"] * sizes["V"]
    states = sizes["H"] * sizes["K"] * sizes["V"]
    forward, backward = scores + values + 2 * states, 3 * scores + 2 * values + 4 * states
    return dict(forward=2 * tokens * forward, backward=2 * tokens * backward)


KERNELS = dict(  # case, module of the kernels, shapes
    selective_scan=(selective_scan, scan, ("8x2048x2048x16:full", "8x2048x2048x16:read3")),
    linear_attention=(linear_attention, attention, ("8x2048x32x128x64:ssd", "8x2048x4x256x512:retention")),
)


def sharding(chip):
    """A sharding on one chip of this kind, to compile for."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology).devices[0]
    return jax.sharding.SingleDeviceSharding(device)


def compile_gradient(chip, case):
    """Compile value and gradients of an operation for one chip."""

    def gradients(arguments, segments, cotangents):
        call = functools.partial(case.call, segment_ids=segments, initial_segment=None, mask=None)
        results, pull = jax.vjp(lambda arguments: call(**arguments), arguments)
        return results, pull(cotangents)

    one, segments = sharding(chip), jax.ShapeDtypeStruct(case.y.shape[:2], jnp.int32)
    shapes = case.arguments, segments, (case.y, case.arguments["initial_state"])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes)
    return jax.jit(gradients).lower(*shapes).compile()


def read_bundles(text):
    """The bundles of a schedule."""
    bundles = []
    for line in text.splitlines():
        match = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2}(?:,? [A-Z]{2})*)?\s*: ([> ]*)\{", line)
        if match:
            branch = re.search(r"sbr\.rel .*region(?: = )?(\d+)", line)
            bundles.append(Bundle(match[1] or "", match[2].count(">"), branch and branch[1], line))
    return bundles


def count_loops(bundles, trips, blocks):
    """Bundles that a kernel with loops over tiles of time issues for a chunk of `blocks` steps: see `Case.count`."""
    loops = []
    for start in [i for i, x in enumerate(bundles) if "LB" in x.label and x.depth == 2]:
        loops.append((start, next(i for i in range(start, len(bundles)) if bundles[i].target)))
    inside = {i for start, end in loops for i in range(start, end + 1)}
    ends = {end for _, end in loops}
    once = set()  # places in branches that are taken only by the first or the last block of a chunk
    for i, x in enumerate(bundles):
        if x.target and x.depth == 1 and i not in ends and i not in inside:
            body = range(i + 1, next((j for j in range(i + 1, len(bundles)) if "PF" in bundles[j].label), i))
            if any(j in inside for j in body) or len(body) > 256:
                once.update(body)
    total = sum((end - start + 1) * trips * (1 if start in once else blocks) for start, end in loops)
    outside = [i for i, x in enumerate(bundles) if x.depth >= 1 and i not in inside]
    total += sum(1 if i in once else blocks for i in outside)
    main = [i for start, end in loops if start not in once for i in range(start, end + 1)]
    return total, [end - start + 1 for start, end in loops], main


def count_steps(bundles, steps):
    """Bundles that a kernel without loops issues in every one of the `steps` steps of a chunk: see `Case.count`."""
    first = next(i for i, x in enumerate(bundles) if x.label)
    last = max(i for i, x in enumerate(bundles) if x.target)
    at_some = set()  # the innermost branches, except one around the whole step
    for i in range(first, last):
        joins = (j for j in range(i, last) if f"empty region {bundles[i].target} " in bundles[j].text)
        body = range(i + 1, next(joins, i))
        if len(body) < (last - first) / 2 and not any(bundles[j].target for j in body):
            at_some.update(body)
    always = sorted(set(range(first, last + 1)) - at_some)
    return len(always) * steps, [len(always)], always


def read_dump(folder, name):
    """Figures of a kernel: bundles without and with empty ones, utilization, bytes of VMEM and of arrays in HBM."""

    def text(ending):
        (path,) = (p for p in glob.glob(f"{folder}/*{name}*-{ending}.txt") if re.search(rf"\d-{ending}.txt$", p))
        return Path(path).read_text(errors="replace")

    lines = text("final_hlo-static-per-bundle-utilization").splitlines()
    used = [[int(n) for n in line.split()] for line in lines if re.fullmatch(r"[\d ]+", line)]
    units = [unit.split(":")[-1].strip().lower() for unit in lines[1].split(",")]
    capacity = [int(n) for n in lines[2].split()]
    allocations = text("post-rematerialize-allocations")
    sizes = re.findall(r"^ *#allocation\d+ .*space=vmem, size = (0x[0-9a-f]+)", allocations, re.M)
    final, moved = text("final_bundles"), 0
    arrays = re.findall(r"inlined_call_operand\.hbm \[shape: [a-z]+(\d+)\[([\d,]+)\], index: (\d+)", final)
    for bits, shape, _ in set(arrays):
        *outer, lanes = map(int, shape.split(","))
        moved += math.prod(outer) * -(-lanes // LANES) * LANES * int(bits) // 8  # rows are padded to whole registers
    schedules = read_bundles(final), read_bundles(text("packed-bundles-post-ra"))
    return *schedules, (units, capacity, used), sum(int(size, 16) for size in sizes), moved


def measure(op, chip, shape, dtype, folder):
    """Rows for the forward and the backward kernel."""
    sizes, variant = shape.split(":")
    sizes = tuple(int(n) for n in sizes.split("x"))
    case, kind = KERNELS[op][0](sizes, variant, jnp.dtype(dtype)), CHIPS[chip]
    for path in glob.glob(f"{folder}/*"):
        os.remove(path)
    compile_gradient(chip, case)
    ends = case.arguments, case.y, case.arguments["initial_state"]
    for name, arrays in dict(forward=ends, backward=(*ends, case.arguments)).items():
        final, scheduled, (units, capacity, used), vmem, moved = read_dump(folder, f"{op}_{name}")
        total, loops, main = case.count(final)
        waiting, *_ = case.count(scheduled)
        cycle = sizes[0] * -(-sizes[1] // case.chunk) / kind.clock / kind.cores  # seconds, once in each chunk
        least = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
        floor = max(case.seconds(kind, name), least / kind.bandwidth)
        share = [sum(used[i][unit] for i in main) / len(main) / most for unit, most in enumerate(capacity)]
        yield dict(
            op=op,
            implementation="mosaic_tpu",
            chip=chip,
            shape=list(sizes),
            variant=variant,
            dtype=dtype,
            vmem_bytes=vmem,
            vmem_of_core=kind.vmem,
            bundles_per_chunk=total,
            bundles_per_token=round(total / case.chunk, 1),
            scheduled_per_token=round(waiting / case.chunk, 1),
            bundles_of_loops=loops,
            slots_used={unit: round(x, 2) for unit, x in zip(units, share, strict=True)},
            chunk=case.chunk,
            block=case.block,
            estimated_ms=round(max(total * cycle, moved / kind.bandwidth) * 1e3, 3),
            scheduled_ms=round(max(waiting * cycle, moved / kind.bandwidth) * 1e3, 3),
            floor_ms=round(floor * 1e3, 3),
            jax=jax.__version__,
            libtpu=importlib.metadata.version("libtpu"),
            date=datetime.date.today().isoformat(),
            commit=commit(),
        ) | {"pass": name}


@contextlib.contextmanager
def constants(module, settings):
    """A context in which the constants "NAME=number,..." are set in the kernels' module."""
    new = {k: int(v) for k, v in (s.split("=") for s in settings.split(",") if s)}
    old = {k: getattr(module, k) for k in new}
    try:
        vars(module).update(new)
        yield
    finally:
        vars(module).update(old)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", default="selective_scan", choices=KERNELS)
    for name, default in dict(chips=",".join(CHIPS), shapes=None, dtypes="bfloat16,float32").items():
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--out", type=Path, help="file of results")
    parser.add_argument("--try", dest="tries", action="append", help="constants of mosaic_tpu; nothing is kept")
    options = parser.parse_args()
    _, module, shapes = KERNELS[options.op]
    shapes = options.shapes.split(",") if options.shapes else shapes
    cases = itertools.product(options.tries or [""], options.chips.split(","), shapes, options.dtypes.split(","))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        for settings, chip, shape, dtype in cases:
            with constants(module, settings):
                rows = list(measure(options.op, chip, shape, dtype, folder))
            for row in rows:
                slots = {unit: used for unit, used in row["slots_used"].items() if used > 0.04}
                print(
                    f"{settings} {chip} {shape} {dtype:8} {row['pass']:8}",
                    f"{row['bundles_per_token']:7.1f} bundles/token ({row['scheduled_per_token']:.1f} scheduled),",
                    f"loops {row['bundles_of_loops']}, {row['vmem_bytes'] / 2**20:.1f} MiB VMEM,",
                    f"{row['estimated_ms']:.2f} ms (scheduled {row['scheduled_ms']:.2f}, floor {row['floor_ms']:.2f}),",
                    f"slots {slots}",
                    flush=True,
                )
                if not options.tries:
                    record(options.out or RESULTS / f"{options.op}_tpu_aot.json", row, KEY)


if __name__ == "__main__":
    main()
