"""What XLA compiles for the delta rule and for Conba, and what an H100, which need not be there, would launch.

    JAX_PLATFORMS=cpu python benchmarks/launches.py          # the figures of docs/mixcon.md
    JAX_PLATFORMS=cpu python benchmarks/launches.py --rows=256 --length=64 --heads=8 --size=16

For a call with its backward pass, bfloat16, with documents: instructions before and after XLA's passes, CPU seconds to
trace and to compile (they do not depend on what else runs on the machine, but no product is tuned, as a GPU that is
there would), and kernels that one call launches, loops counted by their iterations. It needs jax's CUDA plug-in.
"""

import collections
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from seqmodels import cli

TARGET = Path(__file__).resolve().parents[1] / "tests" / "kernels" / "h100.pbtxt"
FREE = ("parameter", "get-tuple-element", "bitcast", "tuple", "constant", "fusion-done", "partition-id")


def define(flag_values: flags.FlagValues, argv: list[str]) -> None:
    for name, default, meaning in (
        ("rows", 256, "Rows B"),
        ("length", 64, "Tokens T of a row"),
        ("heads", 8, "Heads H"),
        ("size", 16, "Channels of a head, K = V"),
    ):
        flags.DEFINE_integer(name, default, f"{meaning}.", flag_values=flag_values)


def main(flag_values: flags.FlagValues) -> int:
    sizes = (flag_values.rows, flag_values.length, flag_values.heads, flag_values.size)
    for name, make in (("delta_rule", delta_rule), ("conba", conba)):
        print(f"{name} {'x'.join(map(str, sizes))}:", report(*make(*sizes)), flush=True)
    return 0


def delta_rule(rows: int, length: int, heads: int, size: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Conba's use of the operation: its decay is a number for each head, and its read is exclusive."""
    import jax
    import jax.numpy as jnp

    from seqmodels.kernels.delta_rule import delta_rule as operation

    array = jax.ShapeDtypeStruct((rows, length, heads, size), jnp.bfloat16)
    arrays = dict(q=array, k=array, v=array, b=array, log_decay=jax.ShapeDtypeStruct(array.shape[:3], jnp.float32))

    def both(arrays, dy, ids):
        y, pull = jax.vjp(lambda x: operation(a=None, **x, read="exclusive", segment_ids=ids)[0], arrays)
        return y, pull(dy)

    return both, (arrays, array, jax.ShapeDtypeStruct((rows, length), jnp.int32))


def conba(rows: int, length: int, heads: int, size: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One branch, as in configs/mixcon.py: E = heads x size = 2 D, and a state of 8."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from seqmodels.mixers.conba import Conba
    from seqmodels.sequence import make_sequence

    branch = Conba(heads * size // 2, dtype=jnp.bfloat16, layers=8, state=8, head_dim=size)
    x = jax.ShapeDtypeStruct((rows, length, heads * size // 2), jnp.bfloat16)
    fresh = lambda x: nn.unbox(branch.init(jax.random.key(0), x, make_sequence(rows, length)[0]))["params"]  # noqa: E731

    def both(params, x, dy, ids):
        seq, _, _ = make_sequence(rows, length, ids, None)
        y, pull = jax.vjp(lambda params, x: branch.apply({"params": params}, x, seq)[0], params, x)
        return y, pull(dy)

    return both, (jax.eval_shape(fresh, x), x, x, jax.ShapeDtypeStruct((rows, length), jnp.int32))


def report(call: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    """A line about the call, compiled for the GPU."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, SingleDeviceSharding

    devices = topologies.get_topology_desc(platform="cuda", target_config=TARGET.read_text(), topology="1x1x1").devices
    place = SingleDeviceSharding(devices[0])
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
    with jax.sharding.use_abstract_mesh(Mesh(np.array(devices), ("d",)).abstract_mesh):
        start = seconds()
        lowered = jax.jit(call).lower(*arguments)
        traced = seconds()
        compiled = lowered.compile()
        end = seconds()
    computations, entry = parse(compiled.as_text() or "")
    before, after = lowered.as_text().count(" = "), sum(map(len, computations.values()))
    launched = launches(computations, entry)
    return (
        f"instructions {before} before, {after} after; CPU seconds {traced - start:.1f} to trace, "
        f"{end - traced:.1f} to compile; {sum(launched.values())} launches, {dict(launched.most_common(3))}"
    )


def seconds() -> float:
    """CPU seconds of this process and of the compilers that it has started."""
    return sum(os.times()[:4])


def parse(text: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of each computation of a compiled program, and the name of the one it begins with."""
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{", line):
            name = found[2]
            computations[name] = []
            entry = name if found[1] else entry
        elif name and " = " in line:
            computations[name].append(line)
    return computations, entry


def launches(computations: dict[str, list[str]], name: str) -> collections.Counter[str]:
    """Kernels that a computation launches, by the kind of their instruction."""
    total: collections.Counter[str] = collections.Counter()
    for line in computations[name]:
        found = re.search(r" = .*?[})\]] ([\w\-]+)\(", line)
        kind = found[1] if found else "?"
        if kind in ("while", "call", "async-start", "conditional"):
            count = re.search(r"known_trip_count\D*(\d+)", line) if kind == "while" else None
            for inner in re.findall(r"(?:body|to_apply|calls)=%?([\w.\-]+)", line):
                for what, number in launches(computations, inner).items():
                    total[what] += number * (int(count[1]) if count else 1)
        elif kind not in FREE:
            total[kind.removesuffix("-start")] += 1
    return total


if __name__ == "__main__":
    sys.exit(cli.run(main, define, __doc__))
