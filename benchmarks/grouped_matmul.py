"""Times the three products of grouped_matmul, checks them, and records the figures beside those of others.

    python benchmarks/grouped_matmul.py                                          # needs a GPU; several minutes
    python benchmarks/grouped_matmul.py --by=mosaic_gpu,dense --sizes=balanced,skewed
    python benchmarks/grouped_matmul.py --by=mosaic_gpu --plans=256x4x8,128x6x16   # columns, slots, panel; not kept
    python benchmarks/grouped_matmul.py --experts --by=mosaic_gpu,dense

The shape is M x K x N x X: rows, sizes of the matrices, groups. The products are "forward" (x w), "transposed" (dy w^T,
the gradient of x) and "weights" (x^T dy for each group, the gradient of w). Groups are "balanced"; "routed", as of a
router that chooses at random; "skewed", in which the n-th group has a share that falls as 1/n; and "empty", which is
that with no rows in every second group.

Others are "dense" (one matrix for all rows: as many operations, by XLA), "sample" (the kernels that come with jax, with
the tiles that were fastest here) and "torch" (torch._grouped_mm). With --experts, the time is that of a forward and a
backward pass through the two products of a layer of experts with SiLU gates.

The error is the largest relative one of 64 x 64 numbers in each group or in all, against float64 from the same numbers.
A time is the median of --repeat timings of calls for 30 ms each. The floor is the time of the operations at the rate of
the dense product measured in the same run, or of reading each array once and writing the result at the rate of a copy,
whichever is longer. Rows are written to benchmarks/results/grouped_matmul_<device>.json.
"""

import datetime
import functools
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before JAX is loaded

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.kernels import choices
from benchmarks.rates import bandwidth, measure
from benchmarks.record import RESULTS, commit, device_name, record, slug
from seqmodels import cli
from seqmodels.errors import UserError
from seqmodels.kernels import grouped_matmul as op

PASSES = ("forward", "transposed", "weights")
SIZES = ("balanced", "routed", "skewed", "empty")
OTHERS = ("dense", "sample", "torch")
TOLERANCE = 1e-2
KEY = ("op", "implementation", "shape", "sizes", "pass", "device")
ROW = "{:20} {:9} {:11} {:24} {:>9} {:>9} {:>8} {:>9}"


def group_sizes(kind: str, rows: int, groups: int) -> np.ndarray:
    """[X] int32, with the sum `rows`."""
    if kind == "routed":
        return np.random.default_rng(0).multinomial(rows, np.full(groups, 1 / groups)).astype(np.int32)
    share = np.ones(groups) if kind == "balanced" else 1 / np.arange(1, groups + 1)
    if kind == "empty":
        share[1::2] = 0
    sizes = np.floor(share / share.sum() * rows).astype(np.int32)
    sizes[0] += rows - sizes.sum()
    return sizes


def draw(shape: tuple[int, ...], groups: int) -> dict[str, jax.Array]:
    """x, w and dy of normal numbers in bfloat16."""
    rows, inner, outer, _ = shape

    @jax.jit
    def arrays(key):
        keys = jax.random.split(key, groups + 2)
        one = functools.partial(jax.random.normal, shape=(inner, outer), dtype=jnp.bfloat16)
        return dict(
            x=jax.random.normal(keys[0], (rows, inner), jnp.bfloat16),
            dy=jax.random.normal(keys[1], (rows, outer), jnp.bfloat16),
            w=jax.lax.map(one, keys[2:]) * jnp.bfloat16(inner**-0.5),
        )

    return arrays(jax.random.key(0))


@functools.cache  # so that it is compiled once for all sizes
def product(by: str, kind: str, plan: str = "") -> Callable[[dict], jax.Array]:
    """A function of x, w, dy and sizes: the product `kind` by an implementation or one of OTHERS."""
    if by in op.BACKENDS:
        return jax.jit(functools.partial(ours, op.BACKENDS[by], kind, plan))
    if by == "dense":
        calls: dict[str, Callable] = dict(
            forward=lambda a: a["x"] @ a["w"][0],
            transposed=lambda a: a["dy"] @ a["w"][0].T,
            weights=lambda a: a["x"].T @ a["dy"],
        )
        return jax.jit(calls[kind])
    return torch_product(kind) if by == "torch" else jax.jit(functools.partial(sample, kind))


def ours(backend: Any, kind: str, plan: str, a: dict) -> jax.Array:
    """By a backend of kernels/grouped_matmul; `plan` is "" or sizes of mosaic_gpu's kernels."""
    if plan:
        from seqmodels.kernels.grouped_matmul.mosaic_gpu import products
        from seqmodels.kernels.grouped_matmul.mosaic_gpu.pipeline import Plan

        sizes = Plan(*map(int, plan.split("x")))
        if kind == "weights":
            return products.by_groups(a["x"], a["dy"], a["sizes"], plan=sizes)
        rows = a["x"] if kind == "forward" else a["dy"]
        return products.by_rows(rows, a["w"], a["sizes"], transposed=kind == "transposed", plan=sizes)
    if kind == "weights":
        return backend.weight_gradient(a["x"], a["dy"], a["sizes"])
    if kind == "forward":
        return backend.grouped_matmul(a["x"], a["w"], a["sizes"])
    return backend.transposed(a["dy"], a["w"], a["sizes"])


def sample(kind: str, a: dict) -> jax.Array:
    """By the sample kernels of jax."""
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    tiles = dict(block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=8)
    if kind == "weights":
        return transposed_ragged_dot(a["x"], a["dy"], group_sizes=a["sizes"], **tiles)
    rows = a["x"] if kind == "forward" else a["dy"]
    return ragged_dot(rows, a["w"], group_sizes=a["sizes"], transpose_rhs=kind == "transposed", **tiles)


def torch_product(kind: str) -> Callable[[dict], Any]:
    """By torch._grouped_mm; waits for nothing, as JAX."""
    import torch

    def call(a):
        ends = a["ends"]
        if kind == "forward":
            return torch._grouped_mm(a["x"], a["w"], offs=ends)
        if kind == "transposed":
            return torch._grouped_mm(a["dy"], a["w"].transpose(1, 2), offs=ends)
        return torch._grouped_mm(a["x"].t(), a["dy"], offs=ends)

    return call


def torch_arrays(a: dict) -> dict:
    """The same arrays, without a copy."""
    import torch

    arrays = {name: torch.from_dlpack(a[name]) for name in ("x", "w", "dy", "sizes")}
    return arrays | dict(ends=arrays["sizes"].cumsum(0).to(torch.int32))


def torch_measure(call: Callable, a: dict, repeat: int) -> float:
    """Median seconds of a call, by the device's clock."""
    import torch

    def timing(calls):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            call(a)
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / calls / 1e3

    calls = max(2, int(0.03 / timing(3)))
    return float(np.median([timing(calls) for _ in range(repeat)]))


def error(kind: str, a: dict, got: Any) -> float:
    """The largest relative error of a group, of 64 x 64 numbers of the result."""
    sizes = np.asarray(a["sizes"])
    ends = np.cumsum(sizes)
    double = functools.partial(np.asarray, dtype=np.float64)
    (rows, inner), outer = a["x"].shape, a["dy"].shape[1]
    over = {name: np.linspace(0, n - 1, 64).astype(int) for name, n in dict(m=rows, k=inner, n=outer).items()}
    if kind == "weights":
        x, dy = double(a["x"][:, over["k"]]), double(a["dy"][:, over["n"]])
        want = np.stack([x[e - s : e].T @ dy[e - s : e] for s, e in zip(sizes, ends, strict=True)])
        ours = double(got[:, over["k"]][:, :, over["n"]])
    else:
        left, right = (a["x"], a["w"][:, :, over["n"]]) if kind == "forward" else (a["dy"], a["w"][:, over["k"]])
        if kind == "transposed":
            right = right.swapaxes(1, 2)
        group = np.searchsorted(ends, over["m"], side="right")
        want = np.einsum("mk,mkn->mn", double(left[over["m"]]), double(right)[group])
        ours = double(got[over["m"]][:, over["n" if kind == "forward" else "k"]])
    difference, scale = np.linalg.norm(ours - want), np.linalg.norm(want)
    return float("inf") if np.isnan(difference) else float(difference / scale)


def experts(by: str, plan: str, shape: tuple[int, ...]) -> Callable[[dict], Any]:
    """The gradients of a layer of experts: [K, 2 N] and then [N, K], with SiLU gates in between."""

    def layer(x, up, down, sizes):
        def multiply(x, w):
            return x @ w[0] if by == "dense" else op.grouped_matmul(x, w, sizes, implementation=by)

        gate, value = jnp.split(multiply(x, up), 2, axis=1)
        return multiply(jax.nn.silu(gate) * value, down)

    @jax.jit
    def run(a):
        groups = 1 if by == "dense" else None
        _, pull = jax.vjp(functools.partial(layer, sizes=a["sizes"]), a["x"], a["up"][:groups], a["down"][:groups])
        return pull(a["dy"])

    return run


def define(flag_values: flags.FlagValues, argv: list[str]) -> None:
    define_flag = functools.partial(flags.DEFINE_string, flag_values=flag_values)
    define_flag("shape", "8192x4096x14336x16", "M x K x N x X.")
    define_flag("sizes", ",".join(SIZES), "Kinds of groups.")
    define_flag("by", "", f"Implementations, and {', '.join(OTHERS)}; all but the reference if left out.")
    define_flag("passes", ",".join(PASSES), "Products.")
    define_flag("plans", "", "Sizes of mosaic_gpu's kernels, columns x slots x panel, to compare; not recorded.")
    define_flag("platform", "", "cpu, gpu or tpu; what is there if left out.")
    define_flag("out", "", "File of results; by device if left out.")
    flags.DEFINE_boolean("experts", False, "Time a layer of experts instead.", flag_values=flag_values)
    flags.DEFINE_integer("repeat", 7, "Timings, of which the median counts.", flag_values=flag_values, lower_bound=1)


def main(flag_values: flags.FlagValues) -> int:
    cli.use_platform(flag_values.platform)
    numbers = flag_values.shape.split("x")
    if len(numbers) != 4 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise UserError(f"--shape={flag_values.shape}: must be M x K x N x X, as 8192x4096x14336x16")
    shape = tuple(map(int, numbers))
    kinds = choices("sizes", flag_values.sizes, SIZES, SIZES)
    there = (*op.IMPLEMENTATIONS, *OTHERS)
    everyone = ["dense", *(name for name in there if name not in ("reference", "dense", "mosaic_tpu"))]
    names = choices("by", flag_values.by, there, everyone)
    passes = choices("passes", flag_values.passes, PASSES, PASSES)
    bench = Bench(shape, flag_values)
    if flag_values.experts:
        return bench.experts(names, kinds)
    failed = 0
    for by, kind, one in itertools.product(names, passes, kinds):
        plans = flag_values.plans.split(",") if by == "mosaic_gpu" else [""]
        failed += sum(bench.row(by, kind, one, plan) for plan in plans)
    return int(failed > 0)


class Bench:
    """Times and records the products of one shape."""

    def __init__(self, shape: tuple[int, ...], flag_values: flags.FlagValues) -> None:
        self.shape, self.flags = shape, flag_values
        self.device = jax.devices()[0]
        self.path = Path(flag_values.out or RESULTS / f"grouped_matmul_{slug(device_name(self.device))}.json")
        self.copy = bandwidth(self.device)
        self.arrays = {} if flag_values.experts else draw(shape, shape[3])
        self.flops = 2.0 * shape[0] * shape[1] * shape[2]
        self.dense: dict[str, float] = {}  # seconds
        head = (
            f"{device_name(self.device)}, jax {jax.__version__}, copy {self.copy / 1e9:,.0f} GB/s, {flag_values.shape}"
        )
        print(head, ROW.format("by", "sizes", "pass", "plan", "ms", "Tflop/s", "floors", "error"), sep="\n", flush=True)

    def row(self, by: str, kind: str, sizes: str, plan: str) -> bool:
        """Time one product; whether it failed."""
        if by == "dense" and kind in self.dense:
            return False  # has no groups
        rows, inner, outer, groups = self.shape
        a = self.arrays | dict(sizes=jnp.asarray(group_sizes(sizes, rows, groups)))
        try:
            call = product(by, kind, plan)
            wrong = None if by == "dense" else self.error_of(by, kind, a, call)
            if by == "torch":
                seconds = torch_measure(call, torch_arrays(a), self.flags.repeat)
            else:
                seconds = measure(call, [a], self.flags.repeat)
        except Exception as problem:  # such as a package that is missing; the other rows are still measured
            message = " ".join(str(problem).split())[:200]
            print(ROW.format(by, sizes, kind, plan, *"!" * 4), f"{type(problem).__name__}: {message}", flush=True)
            return by in op.BACKENDS
        if by == "dense":
            self.dense[kind] = seconds
        moved = 2.0 * (rows * (inner + outer) + groups * inner * outer)
        floor = max(self.dense.get(kind, 0.0), moved / self.copy)
        figures = f"{seconds * 1e3:.4f}", f"{self.flops / seconds / 1e12:.0f}", f"{seconds / floor:.2f}"
        shown = "-" if wrong is None else f"{wrong:.1e}"
        print(ROW.format(by, "-" if by == "dense" else sizes, kind, plan, *figures, shown), flush=True)
        if not plan:
            self.record(by, kind, "-" if by == "dense" else sizes, seconds, floor, wrong)
        return wrong is not None and wrong > TOLERANCE

    def error_of(self, by: str, kind: str, a: dict, call: Callable) -> float:
        if by != "torch":
            return error(kind, a, call(a))
        return error(kind, a, jnp.from_dlpack(call(torch_arrays(a)).contiguous()))

    def experts(self, names: list[str], kinds: list[str]) -> int:
        """Time layers of experts."""
        rows, inner, outer, groups = self.shape
        weights = draw((1, inner, 2 * outer, 0), groups)["w"], draw((1, outer, inner, 0), groups)["w"]
        x = draw((rows, inner, inner, 0), 0)
        for by, sizes in itertools.product(names, kinds):
            if by in ("sample", "torch") or (by == "dense" and sizes != kinds[0]):
                continue
            a = dict(x=x["x"], dy=x["dy"], up=weights[0], down=weights[1])
            a |= dict(sizes=jnp.asarray(group_sizes(sizes, rows, groups)))
            seconds = measure(experts(by, "", self.shape), [a], self.flags.repeat)
            flops = 9 * self.flops
            figures = f"{seconds * 1e3:.4f}", f"{flops / seconds / 1e12:.0f}", "-", "-"
            print(ROW.format(by, sizes, "experts", "", *figures), flush=True)
            self.record(by, "experts", "-" if by == "dense" else sizes, seconds, None, None)
        return 0

    def record(self, by: str, kind: str, sizes: str, seconds: float, floor: float | None, wrong: float | None) -> None:
        result = {"op": "grouped_matmul", "implementation": by, "shape": list(self.shape), "sizes": sizes, "pass": kind}
        result |= dict(dtype="bfloat16", ms=round(seconds * 1e3, 5), floor_ms=floor and round(floor * 1e3, 5))
        result |= dict(error=wrong and float(f"{wrong:.3g}"), device=device_name(self.device), jax=jax.__version__)
        record(self.path, result | dict(date=datetime.date.today().isoformat(), commit=commit()), KEY)


if __name__ == "__main__":
    sys.exit(cli.run(main, define, __doc__))
