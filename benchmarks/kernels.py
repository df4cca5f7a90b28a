"""Checks every implementation of an operation against float64, times it, and records the figures.

    python benchmarks/kernels.py                                        # selective_scan at the shapes for this device
    python benchmarks/kernels.py --shapes=table,decode --implementations=mosaic_gpu --repeat=30
    python benchmarks/kernels.py --op=short_conv --shapes=8x2048x2048x4:silu --dtypes=float32
    python benchmarks/kernels.py --op=linear_attention --shapes=table
    python benchmarks/kernels.py --op=linear_scan --shapes=table        # and jax's associative scan

A shape consists of its sizes (B x T x E x N for the selective scan, B x T x E x W for the short convolution,
B x T x H x K x V for linear attention, B x T x D for the linear scan), a colon, and a variant. A name such as "table"
stands for several shapes. The variants of the selective scan are "full" (softplus, bias, D, z), "bare" (none of these)
and "readG" (full, with G groups of states read into one output, each group with one weight per channel). The variants
of linear attention are "ssd" (Mamba-2: one decay per token and head, keys shared by all heads), "retention" (RetNet:
constant decays), "linear" (no decay) and "gla" (a decay for each channel). Those of the linear scan are "hgrn" (log
decays in float32) and "hgrn16" (in the dtype of the activations).

The outputs, the final state and the gradient of every argument are checked, at the same shape that is timed. The
outputs' gradients are zero except for some rows and channels, scattered over the arrays. For these rows and channels,
the sequential reference in float64 computes everything that is compared. The error is the largest relative error of an
array, in the Frobenius norm. An error above the dtype's tolerance fails the run, but is recorded too.

A time is the median over --repeat timings. Each timing has as many consecutive calls as take 30 ms, and the calls
rotate over input sets larger than the caches. On accelerators, calls too short to be dispatched one by one are compiled
into programs of 16 calls. A forward pass over a few tokens is a step of decoding: it updates the state in place, 64
times in a loop on the device. So there are 16 input sets for it; with a single sequence these are not larger than the
caches, although in a model the weights are.

A floor is the time of a pass that does only one of the following, whichever takes longest: move its bytes at the copy
bandwidth measured here; compute its exponentials at 16 per clock and multiprocessor; or compute its matrix products (of
16-bit factors) at the rate that large products reach on the tensor cores. GB/s, Gexp/s and Tflop/s count the same bytes
and operations. The floor of forward+backward is the sum of both passes' floors.

Rows are written to benchmarks/results/kernels_<device>.json one by one, and replace older rows of the same kind.
"""

import dataclasses
import datetime
import functools
import importlib
import itertools
import math
import operator
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before JAX is loaded

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.operations import OPERATIONS, Argument, Operation, normal
from benchmarks.rates import EXPS_PER_SECOND, FLOPS_PER_SECOND, bandwidth, measure
from benchmarks.record import RESULTS, commit, device_name, record, slug
from seqmodels import cli
from seqmodels.errors import UserError
from seqmodels.kernels.dispatch import UnsupportedError

PASSES = ("forward", "forward+backward")
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}  # the last two round their outputs
KEY = ("op", "implementation", "shape", "variant", "dtype", "pass", "device")
SHORT = 0.6  # ms of floor below which the time to dispatch a call matters
TOGETHER = 16  # calls per program for those
FEW = 8  # most tokens of a forward pass that counts as a step of decoding
ROUNDS = 64  # such steps on each input set
CACHE = 2**28  # bytes; all input sets together are larger
CHECKED = 2**22  # most numbers of the float64 reference: tokens times channels times states
ROW = "{:26} {:9} {:12} {:17} {:>10} {:>9} {:>7} {:>7} {:>7} {:>8} {:>9} {:>4}"


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation at one shape, variant and dtype."""

    operation: Operation
    shape: tuple[int, ...]
    variant: str
    dtype: str

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        return self.operation.sizes(self.shape, self.variant)

    @functools.cached_property
    def arguments(self) -> dict[str, Argument]:
        return self.operation.arguments(self.variant)

    @functools.cached_property
    def outputs(self) -> dict[str, Argument]:
        """The outputs, with random values for their gradients; states are float32."""
        axes = self.operation.outputs(self.variant)
        return {name: Argument(letters, normal, low=name != "state") for name, letters in axes.items()}

    def __str__(self):
        return f"{'x'.join(map(str, self.shape))}:{self.variant}"

    def bytes_of(self, arrays: dict[str, Argument]) -> int:
        """Bytes of arrays with these axes."""
        low = 4 if self.dtype == "float32" else 2
        return sum(math.prod(self.sizes[a] for a in x.axes) * (low if x.low else 4) for x in arrays.values())

    @property
    def differentiated(self) -> dict[str, Argument]:
        """The arguments that have gradients."""
        return {name: x for name, x in self.arguments.items() if not x.fixed}

    def costs(self, kind: str) -> list[tuple[int, float, float]]:
        """(bytes, exponentials, flops) of the forward and, with kind "forward+backward", of the backward pass.

        The forward pass reads every argument and writes every output once. The backward pass reads the arguments and
        the outputs' gradients once, writes the arguments' gradients once, and computes the exponentials again.
        """
        arguments, outputs = self.bytes_of(self.arguments), self.bytes_of(self.outputs)
        gradients = self.bytes_of(self.differentiated)
        exps, (forward, backward) = self.operation.exps(self.sizes), self.operation.flops(self.sizes)
        both = [(arguments + outputs, exps, forward), (arguments + outputs + gradients, exps, backward)]
        return both[: 1 + PASSES.index(kind)]

    @functools.cached_property
    def draw(self) -> Callable[[int], tuple[dict, dict]]:
        """A function from a seed to random arguments and gradients of the outputs."""

        def array(key, number, axes: Argument):
            values = axes.draw(jax.random.fold_in(key, number), tuple(self.sizes[a] for a in axes.axes))
            return values.astype(self.dtype if axes.low else "float32")

        @jax.jit
        def arrays(seed):
            key = jax.random.key(seed)
            arguments = {n: array(key, i, x) for i, (n, x) in enumerate(self.arguments.items())}
            return arguments, {n: array(key, 100 + i, x) for i, (n, x) in enumerate(self.outputs.items())}

        return arrays

    @functools.cached_property
    def chosen(self) -> dict[str, np.ndarray]:
        """Indices that are checked for each axis in `operation.apart`: all, or some scattered from first to last."""
        budget = CHECKED // math.prod(self.sizes[a] for a in self.operation.work if a not in self.operation.apart)
        chosen = {}
        others = len(self.operation.apart) - 1
        for letter, most in zip(self.operation.apart, [2] * others + [max(budget // 2**others, 4)], strict=True):
            size = self.sizes[letter]
            chosen[letter] = np.linspace(0, size - 1, min(size, most)).round().astype(int)
        return chosen

    @property  # not kept: large shapes need the memory
    def checked(self) -> tuple[dict, dict]:
        """Random arguments, and gradients of the outputs that are zero except at the chosen indices."""
        arguments, cotangents = self.draw(1)
        return arguments, {n: keep(x, self.outputs[n].axes, self.chosen) for n, x in cotangents.items()}

    def picked(self, outputs: dict, gradients: dict | None) -> tuple[dict, dict]:
        """The chosen indices of each output and of each argument's gradient, in float64 on the host."""

        def some(arrays, axes):
            return {n: np.asarray(take(x, axes[n].axes, self.chosen), np.float64) for n, x in arrays.items()}

        return some(outputs, self.outputs), some(gradients or {}, self.arguments)

    def vjp(self, arguments: dict, implementation: str) -> tuple[dict, Callable]:
        """The outputs, and the function from their gradients to those of the arguments that have one."""
        varied = {name: arguments[name] for name in self.differentiated}

        def call(varied):
            return self.operation.call(arguments | varied, self.variant, implementation)

        return jax.vjp(call, varied)

    @functools.cached_property
    def truth(self) -> tuple[dict, dict]:
        """`picked`, computed by the float64 reference from the chosen indices of the arguments."""
        arguments, cotangents = self.checked
        cotangents, arguments = self.picked(cotangents, arguments)

        def both(arguments, cotangents):
            outputs, pullback = self.vjp(arguments, "reference")
            return outputs, pullback(cotangents)[0]

        with jax.enable_x64(True), jax.default_device(host()):
            return jax.tree.map(np.asarray, jax.jit(both)(arguments, cotangents))


def host():
    """The CPU, or the available device if JAX has no CPU backend."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return jax.devices()[0]


def parse_shapes(operation: Operation, text: str, dtypes: list[str]) -> list[Case]:
    """The cases that --shapes and --dtypes request. Raises UserError."""
    specs = [spec for word in text.split(",") for spec in operation.shapes.get(word, (word,))]
    cases = []
    for spec in dict.fromkeys(specs):
        sizes, _, variant = spec.partition(":")
        numbers = sizes.split("x")
        if len(numbers) != len(operation.letters) or not all(n.isdecimal() and int(n) > 0 for n in numbers):
            raise UserError(
                f"--shapes={spec}: allowed are {', '.join(operation.shapes)}, and {' x '.join(operation.letters)} "
                f"as in {operation.shapes['table'][0]}"
            )
        for dtype in dtypes:
            case = Case(operation, tuple(map(int, numbers)), variant, dtype)
            try:
                _ = case.arguments, case.sizes
            except ValueError as error:
                raise UserError(f"--shapes={spec}: {error}") from error
            cases.append(case)
    return cases


def decodes(case: Case, kind: str) -> bool:
    """Whether a pass is a step of decoding."""
    return case.sizes["T"] <= FEW and kind == "forward"


def program(case: Case, implementation: str, kind: str, together: int, rounds: int = 1) -> Callable:
    """A compiled function of a list of `together` pairs (arguments, gradients of the outputs), run one after another.

    For each pair it returns the outputs and, with kind "forward+backward", the gradients of the arguments, else None. A
    step of decoding updates the state in place: the new state becomes an argument.

    Args:
        rounds: how often steps of decoding go through the list, each from the state of the previous one.
    """
    carried = case.operation.carried if decodes(case, kind) else {}

    def one(arguments, cotangents):
        if kind == "forward":
            return case.operation.call(arguments, case.variant, implementation), None
        outputs, pullback = case.vjp(arguments, implementation)
        return outputs, pullback(cotangents)[0]

    def once(states, sets):
        results = []
        for state, (arguments, cotangents) in zip(states, sets, strict=True):
            inputs = (arguments | state, cotangents)
            if results:  # run in order, as a model's layers, and never merge into one kernel
                inputs, results[-1] = jax.lax.optimization_barrier((inputs, results[-1]))
            results.append(one(*inputs))
        return results

    def all_of(states, sets):
        if rounds == 1:
            return once(states, sets)

        def states_of(results):
            return [{argument: outputs[output] for argument, output in carried.items()} for outputs, _ in results]

        def again(_, results):
            given, results = jax.lax.optimization_barrier((sets, results))  # move nothing of a step out of the loop
            return once(states_of(results), given)

        shapes = jax.eval_shape(once, states, sets)
        first = [({n: jnp.zeros(x.shape, x.dtype) for n, x in outputs.items()}, None) for outputs, _ in shapes]
        for state, (outputs, _) in zip(states, first, strict=True):
            outputs.update({carried[argument]: x for argument, x in state.items()})
        return jax.lax.fori_loop(0, rounds, again, first)

    def split(sets):
        states = [{name: arguments[name] for name in carried} for arguments, _ in sets]
        rest = [({n: x for n, x in arguments.items() if n not in carried}, gradients) for arguments, gradients in sets]
        return states, rest

    shapes = [jax.eval_shape(lambda: case.draw(0))] * together
    compiled = jax.jit(all_of, donate_argnums=0).lower(*split(shapes)).compile()

    def run(sets):
        results = compiled(*split(sets))
        for (arguments, _), (outputs, _) in zip(sets, results, strict=True):
            arguments.update({argument: outputs[output] for argument, output in carried.items()})
        return results

    return run


def check(case: Case, run: Callable, together: int) -> float:
    """Largest relative error of the outputs, and of the gradients if `run` computes them, against float64."""
    got = case.picked(*run([case.checked for _ in range(together)])[0])
    worst = 0.0
    for ours, truth in zip(got, case.truth, strict=True):
        for name in ours:
            error = np.linalg.norm(ours[name] - truth[name]) / max(np.linalg.norm(truth[name]), 1e-30)
            worst = max(worst, float("inf") if np.isnan(error) else float(error))
    return worst


def take(array, axes: str, chosen: dict[str, list[int]]):
    """The chosen indices of an array with these axes."""
    for axis, letter in enumerate(axes):
        if letter in chosen:
            array = array.take(np.asarray(chosen[letter]), axis=axis)
    return array


def keep(array, axes: str, chosen: dict[str, list[int]]):
    """The array with zeros at all indices except the chosen ones."""
    for axis, letter in enumerate(axes):
        if letter in chosen:
            kept = jnp.zeros(array.shape[axis], bool).at[jnp.asarray(chosen[letter])].set(True)
            array = jnp.where(kept.reshape([-1 if i == axis else 1 for i in range(array.ndim)]), array, 0)
    return array


def floor_ms(
    case: Case, kind: str, copy: float, exps_per_second: float | None, flops_per_second: float | None
) -> float:
    """Least milliseconds of a pass; see the top of this file.

    Args:
        copy: bytes per second. exps_per_second, flops_per_second: None if unknown; then they do not count.
    """
    rates = copy, exps_per_second or math.inf, flops_per_second or math.inf
    return 1e3 * sum(max(map(operator.truediv, costs, rates)) for costs in case.costs(kind))


def define(flag_values: flags.FlagValues, argv: list[str]) -> None:
    define_flag = functools.partial(flags.DEFINE_string, flag_values=flag_values)
    define_flag("op", "selective_scan", f"Operation: {', '.join(OPERATIONS)}.")
    names = "; ".join(f"{name}: {', '.join(op.shapes)}" for name, op in OPERATIONS.items())
    define_flag(
        "shapes", "", f"Shapes or their names ({names}); small on a CPU, table and decode elsewhere if left out."
    )
    define_flag("implementations", "", "Names, apart by commas; all but the reference if left out.")
    define_flag("passes", "", f"{' or '.join(PASSES)}; both if left out, forward alone for one token.")
    define_flag("dtypes", "", "Of activations: bfloat16, float16, float32; float32 on a CPU, bfloat16 elsewhere.")
    define_flag("platform", "", "cpu, gpu or tpu; what is there if left out.")
    define_flag("out", "", "File of results; by device if left out.")
    flags.DEFINE_integer("repeat", 20, "Timings, of which the median counts.", flag_values=flag_values, lower_bound=1)
    flags.DEFINE_boolean(
        "check", True, "Against float64. --nocheck is quicker, and keeps no figures.", flag_values=flag_values
    )


def choices(flag: str, text: str, allowed, default) -> list[str]:
    """The words of a flag. Raises UserError for one that is not allowed."""
    words = text.split(",") if text else list(default)
    for word in words:
        if word not in allowed:
            raise UserError(f"--{flag}={word}: allowed are {', '.join(allowed)}")
    return words


def main(flag_values: flags.FlagValues) -> int:
    cli.use_platform(flag_values.platform)
    device = jax.devices()[0]
    cpu = device.platform == "cpu"
    (name,) = choices("op", flag_values.op, OPERATIONS, ())
    dtypes = choices("dtypes", flag_values.dtypes, TOLERANCE, ["float32" if cpu else "bfloat16"])
    cases = parse_shapes(OPERATIONS[name], flag_values.shapes or ("small" if cpu else "table,decode"), dtypes)
    there = (*importlib.import_module(f"seqmodels.kernels.{name}").IMPLEMENTATIONS, *OPERATIONS[name].peers)
    others = [implementation for implementation in there if implementation != "reference"]
    implementations = choices("implementations", flag_values.implementations, there, others)
    passes = choices("passes", flag_values.passes, PASSES, PASSES)

    path = Path(flag_values.out or RESULTS / f"kernels_{slug(device_name(device))}.json")
    copy, exps_per_second = bandwidth(device), EXPS_PER_SECOND.get(device.device_kind)
    exps = f"{exps_per_second / 1e9:,.0f} Gexp/s" if exps_per_second else "exponentials not counted"
    print(f"{device_name(device)}, jax {jax.__version__}, copy {copy / 1e9:,.0f} GB/s, {exps}; results in {path}")
    figures_of = "ms", "floor", "floors", "GB/s", "Gexp/s", "Tflop/s", "error", "s"
    print(ROW.format("shape", "dtype", "by", "pass", *figures_of), flush=True)
    failed = 0
    for case, implementation, kind in itertools.product(cases, implementations, passes):
        if kind != "forward" and case.sizes["T"] == 1 and not flag_values.passes:
            continue
        start = time.perf_counter()
        label = (str(case), case.dtype, implementation, kind)
        flops_per_second = None if case.dtype == "float32" else FLOPS_PER_SECOND.get(device.device_kind)
        floor = floor_ms(case, kind, copy, exps_per_second, flops_per_second)
        try:
            ms, error = figures(case, implementation, kind, floor, flag_values.repeat, flag_values.check)
        except UnsupportedError as reason:
            failed += bool(flag_values.implementations)
            print(ROW.format(*label, *"-" * 8), reason, flush=True)
            continue
        except Exception as problem:  # such as out of memory; the other rows are still measured
            failed += 1
            message = " ".join(str(problem).split())[:300]
            print(ROW.format(*label, *"!" * 8), f"{type(problem).__name__}: {message}", flush=True)
            continue
        wrong = error is not None and error > TOLERANCE[case.dtype]
        failed += wrong
        moved, exps, flops = (sum(costs) for costs in zip(*case.costs(kind), strict=True))
        rates = f"{moved / ms / 1e6:.0f}", f"{exps / ms / 1e6:.0f}", f"{flops / ms / 1e9:.0f}"
        figure = f"{ms:.4f}", f"{floor:.4f}", f"{ms / floor:.2f}", *rates
        shown = "-" if error is None else f"{error:.1e}{'!' if wrong else ''}"
        print(ROW.format(*label, *figure, shown, f"{time.perf_counter() - start:.0f}"), flush=True)
        if error is not None:
            result = dict(op=name, implementation=implementation, shape=list(case.shape), variant=case.variant)
            result |= {"dtype": case.dtype, "pass": kind, "ms": round(ms, 5), "floor_ms": round(floor, 5)}
            result |= dict(error=float(f"{error:.3g}"), device=device_name(device), jax=jax.__version__)
            result |= dict(date=datetime.date.today().isoformat(), commit=commit())
            record(path, result, KEY)
    if failed:
        print(f"{failed} failed; ! marks errors above {TOLERANCE}", file=sys.stderr)
    return int(failed > 0)


def figures(case: Case, implementation: str, kind: str, floor: float, repeat: int, checked: bool):
    """Median milliseconds of one call, and its error, or None if it is not checked."""
    together = TOGETHER if floor < SHORT and jax.default_backend() != "cpu" else 1
    rounds = ROUNDS if together > 1 and decodes(case, kind) else 1
    run = program(case, implementation, kind, together if rounds == 1 else 1)
    error = check(case, run, together if rounds == 1 else 1) if checked else None
    if rounds > 1:
        run = program(case, implementation, kind, together, rounds)
    count = max(2, min(8, math.ceil(CACHE / case.bytes_of(case.arguments) / together)))
    sets = [[case.draw(2 + i * together + j) for j in range(together)] for i in range(count if rounds == 1 else 1)]
    return 1e3 * measure(run, sets, repeat) / (together * rounds), error


if __name__ == "__main__":
    sys.exit(cli.run(main, define, __doc__))
