"""Compiles the selective scan for TPUs that are not at hand, and reads off the schedule what it will cost at least.

    python benchmarks/tpu_aot.py                                   # v5e, v5p, v6e; needs libtpu, no TPU
    python benchmarks/tpu_aot.py --chips=v5e --shapes=8x2048x2048x16:read3 --dtypes=float32
    python benchmarks/tpu_aot.py --chips=v5e --try=WIDTH=256 --try=TOKENS=64    # prints only

A shape is B x T x E x N, a colon, and "full" (softplus, bias, D, z, packed documents) or "readG" (the same, with G
groups of states, each with weights a channel). libtpu dumps the final bundles of both kernels. A core issues at most
one bundle a cycle, so bundles times trips are cycles, if nothing ever stalls: latencies of units are in the bundles,
waits for copies and conflicts in VMEM are not. Counted are, for a chunk of time, the loops by their trips,
the code outside of loops at every block of channels, and what runs only at a chunk's first or last block once.

estimated_ms is the larger of cycles and of the bytes of all arguments and results at the bandwidth of HBM: below it the
kernel as built cannot go; nothing says that it gets there. floor_ms has, in place of the cycles, those of the
exponentials alone, one register of 1024 a cycle. A v5p counts as two cores, each with half of the batch.

Rows go to benchmarks/results/selective_scan_tpu_aot.json, each in place of an older one of the same kind.
"""

import argparse
import contextlib
import datetime
import glob
import importlib.metadata
import itertools
import os
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",  # looks for no TPU on the network
    TPU_ACCELERATOR_TYPE="v5litepod-4",  # any; else libtpu complains
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # or one process at a time may compile
    TPU_LOG_DIR="disabled",
)

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks.record import RESULTS, commit, record
from kernels.selective_scan import mosaic_tpu
from kernels.selective_scan.mosaic_tpu.tiles import TILE

# topology, cores, cycles/s (peak bfloat16 FLOP/s over those of a core's matrix units in a cycle), bytes/s of HBM,
# bytes of VMEM of a core
CHIPS = dict(
    v5e=("v5e:2x2", 1, 1.5e9, 819e9, 128 * 2**20),
    v5p=("v5p:2x2x1", 2, 1.75e9, 2765e9, 64 * 2**20),
    v6e=("v6e:2x2", 1, 1.75e9, 1640e9, 128 * 2**20),
)
SHAPES = ("8x2048x2048x16:full", "8x2048x2048x16:read3")
KEY = ("op", "implementation", "pass", "chip", "shape", "variant", "dtype", "jax")


def parse_shape(text):
    """ "8x2048x2048x16:read3" to (8, 2048, 2048, 16), 3."""
    sizes, variant = text.split(":")
    return tuple(int(n) for n in sizes.split("x")), 1 if variant == "full" else int(variant.removeprefix("read"))


def sharding(chip):
    """One chip of that kind, to compile for."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip][0]).devices[0]
    return jax.sharding.SingleDeviceSharding(device)


def compile_gradient(chip, sizes, groups, dtype):
    """Compiles value and gradients of the scan for one chip.

    Returns:
        compiled, and the shapes of (arguments, results) of the forward and of the backward pass.
    """
    batch, length, width, state = sizes
    one = sharding(chip)

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=one)

    args = dict(
        u=array(batch, length, groups, width),
        dt=array(batch, length, groups, width),
        A=array(groups, width, state, dtype=jnp.float32),
        B=array(batch, length, groups, state),
        C=array(batch, length, groups, state),
        D=array(width, dtype=jnp.float32),
        z=array(batch, length, width),
        dt_bias=array(groups, width, dtype=jnp.float32),
        weights=array(batch, length, groups - 1, width) if groups > 1 else None,
        initial_state=array(batch, groups, width, state, dtype=jnp.float32),
    )
    segments = array(batch, length, dtype=jnp.int32)
    results = (array(batch, length, width), args["initial_state"])

    def gradients(args, segments, cotangents):
        def scan(args):
            return mosaic_tpu.selective_scan(
                **args, segment_ids=segments, initial_segment=None, mask=None, dt_softplus=True
            )

        results, pull = jax.vjp(scan, args)
        return results, pull(cotangents)

    compiled = jax.jit(gradients).lower(args, segments, results).compile()
    return compiled, dict(forward=(args, results), backward=((args, results), args))


def schedule(bundles, utilization, tokens, blocks):
    """What a kernel issues for one chunk of time, read off its final bundles.

    Returns:
        bundles of a chunk, bundles of each loop's body, and the share of slots used by each unit in the loops.
    """
    rows = []  # (label, loops around it, whether it branches)
    for line in bundles.splitlines():
        match = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2}(?:,? [A-Z]{2})*)?\s*: ([> ]*)\{", line)
        if match:
            rows.append((match[1] or "", match[2].count(">"), "sbr.rel" in line))
    units, capacity, used = utilization
    loops = []
    for start in [i for i, (label, depth, _) in enumerate(rows) if "LB" in label and depth == 2]:
        loops.append((start, next(i for i in range(start, len(rows)) if rows[i][2])))
    inside = {i for start, end in loops for i in range(start, end + 1)}
    ends = {end for _, end in loops}
    once = set()  # places in branches that only the first or the last block of a chunk takes
    for i, (_, depth, branch) in enumerate(rows):
        if branch and depth == 1 and i not in ends and i not in inside:
            join = next((j for j in range(i + 1, len(rows)) if "PF" in rows[j][0]), i)
            body = range(i + 1, join)
            if any(j in inside for j in body) or len(body) > 256:
                once.update(body)
    trips = tokens // TILE
    total = sum((end - start + 1) * trips * (1 if start in once else blocks) for start, end in loops)
    outside = [i for i, (_, depth, _) in enumerate(rows) if depth >= 1 and i not in inside]
    total += sum(1 if i in once else blocks for i in outside)
    main = [i for start, end in loops if start not in once for i in range(start, end + 1)]
    share = {u: round(sum(used[i][k] for i in main) / len(main) / capacity[k], 2) for k, u in enumerate(units)}
    return total, [end - start + 1 for start, end in loops], share


def read_dump(folder, name):
    """Final bundles, utilization and bytes of VMEM of the kernel of that name."""

    def text(ending):
        (path,) = (p for p in glob.glob(f"{folder}/*{name}*-{ending}.txt") if re.search(rf"\d-{ending}.txt$", p))
        return Path(path).read_text(errors="replace")

    lines = text("final_hlo-static-per-bundle-utilization").splitlines()
    used = [[int(n) for n in line.split()] for line in lines if re.fullmatch(r"[\d ]+", line)]
    units = [unit.split(":")[-1].strip().lower() for unit in lines[1].split(",")]
    capacity = [int(n) for n in lines[2].split()]
    sizes = re.findall(
        r"^ *#allocation\d+ .*space=vmem, size = (0x[0-9a-f]+)", text("post-rematerialize-allocations"), re.M
    )
    return text("final_bundles"), (units, capacity, used), sum(int(size, 16) for size in sizes)


def bytes_of(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def measure(chip, shape, dtype, folder):
    """Rows of the forward and of the backward kernel."""
    sizes, groups = parse_shape(shape)
    for path in glob.glob(f"{folder}/*"):
        os.remove(path)
    _, arrays = compile_gradient(chip, sizes, groups, jnp.dtype(dtype))
    batch, length, width, state = sizes
    _, cores, clock, bandwidth, core_vmem = CHIPS[chip]
    tokens = mosaic_tpu.chunk_tokens(length, groups, state)
    exponentials = batch * length * groups * width * state / 1024
    blocks = width // mosaic_tpu.block_width(width, groups, state)
    for name in ("forward", "backward"):
        bundles, utilization, vmem = read_dump(folder, f"selective_scan_{name}")
        total, loops, share = schedule(bundles, utilization, tokens, blocks)
        seconds = total * batch * (length // tokens) / clock / cores
        moved = bytes_of(arrays[name]) / bandwidth
        yield dict(
            op="selective_scan",
            implementation="mosaic_tpu",
            chip=chip,
            shape=list(sizes),
            variant=shape.split(":")[1],
            dtype=dtype,
            vmem_bytes=vmem,
            vmem_of_core=core_vmem,
            bundles_per_chunk=total,
            bundles_per_token=round(total / tokens, 1),
            bundles_of_loops=loops,
            slots_used=share,
            chunk=tokens,
            block=width // blocks,
            estimated_ms=round(max(seconds, moved) * 1e3, 3),
            floor_ms=round(max(exponentials / clock / cores, moved) * 1e3, 3),
            jax=jax.__version__,
            libtpu=importlib.metadata.version("libtpu"),
            date=datetime.date.today().isoformat(),
            commit=commit(),
        ) | {"pass": name}


@contextlib.contextmanager
def constants(settings):
    """Runs with "NAME=number,..." set in mosaic_tpu."""
    new = {k: int(v) for k, v in (s.split("=") for s in settings.split(",") if s)}
    old = {k: getattr(mosaic_tpu, k) for k in new}
    try:
        vars(mosaic_tpu).update(new)
        yield
    finally:
        vars(mosaic_tpu).update(old)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(chips=CHIPS, shapes=SHAPES, dtypes=("bfloat16", "float32")).items():
        parser.add_argument(f"--{name}", default=",".join(default))
    parser.add_argument("--out", type=Path, default=RESULTS / "selective_scan_tpu_aot.json", help="file of results")
    parser.add_argument("--try", dest="tries", action="append", help="constants of mosaic_tpu; nothing is kept")
    options = parser.parse_args()
    cases = itertools.product(
        options.tries or [""], options.chips.split(","), options.shapes.split(","), options.dtypes.split(",")
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        for settings, chip, shape, dtype in cases:
            with constants(settings):
                rows = list(measure(chip, shape, dtype, folder))
            for row in rows:
                slots = {unit: used for unit, used in row["slots_used"].items() if used > 0.04}
                print(
                    f"{settings} {chip} {shape} {dtype:8} {row['pass']:8}",
                    f"{row['bundles_per_token']:7.1f} bundles/token, loops {row['bundles_of_loops']},",
                    f"{row['vmem_bytes'] / 2**20:.1f} MiB VMEM,",
                    f"{row['estimated_ms']:.2f} ms (floor {row['floor_ms']:.2f}), slots {slots}",
                    flush=True,
                )
                if not options.tries:
                    record(options.out, row, KEY)


if __name__ == "__main__":
    main()
