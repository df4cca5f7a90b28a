"""Times single branches, forward and backward, and records what each needs: time and temporary memory.

    python benchmarks/branches.py                          # the groups of GROUPS
    python benchmarks/branches.py --groups=conba
    python benchmarks/branches.py --groups=conba --width=64 --batch=2 --length=128     # on a CPU

A call is the branch's output and the gradients of its input and its float32 parameters, for random inputs. Every row of
a group is compared with the first. The figures are written to benchmarks/results/branches_<device>.json.
"""

import datetime
import sys
from concurrent import futures
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from benchmarks.record import RESULTS, commit, device_name, record, slug
from seqmodels import cli
from seqmodels.errors import UserError

# Rows: name, word of the pattern, fields of config.model. A group: (width, batch, length), and rows, the mark first.
JAMBA = {"mamba.norms": "learned", "mamba.norm_eps": 1e-6}
MIXTURE = {
    "mlp of the active size": ("mlp", {"mlp.hidden": 2 * 14336}),
    "moe, 2 of 16": ("moe", {"moe.experts": 16, "moe.top_k": 2, "moe.hidden": 14336}),
}
GROUPS: dict[str, tuple[tuple[int, int, int], dict[str, tuple[str, dict[str, Any]]]]] = {
    "conba": (
        (1024, 8, 2048),
        {
            "mamba, learned norms": ("mamba", JAMBA),
            "folded, no control": ("conba", {"conba.state_eval": "folded", "conba.control": "off"}),
            "folded": ("conba", {"conba.state_eval": "folded"}),
            "no control, no scaling, no delay": (
                "conba",
                {"conba.control": "off", "conba.scaling": "off", "conba.delay": 0},
            ),
            "no control, no scaling": ("conba", {"conba.control": "off", "conba.scaling": "off"}),
            "no control": ("conba", {"conba.control": "off"}),
            "literal scaling, no control": ("conba", {"conba.control": "off", "conba.scaling": "literal"}),
            "conba": ("conba", {}),
            "no delay": ("conba", {"conba.delay": 0}),
            "scalar gain": ("conba", {"conba.gain": "scalar"}),
            "published rule": ("conba", {"conba.rule": "published"}),
            "head_dim 32": ("conba", {"conba.head_dim": 32}),
            "input, 1 sweep": ("conba", {"conba.control": "input"}),
            "input, 2 sweeps": ("conba", {"conba.control": "input", "conba.sweeps": 2}),
        },
    ),
    "moe": ((4096, 8, 2048), MIXTURE),
    "moe-4k": ((4096, 2, 2048), MIXTURE),
    "ssm": (
        (1024, 8, 2048),
        {
            "mamba": ("mamba", {}),
            "s4d": ("s4d", {}),
            "s5, state 256": ("s5", {"s5.state": 256, "s5.blocks": 8}),
            "s5, state 1024": ("s5", {"s5.state": 1024, "s5.blocks": 8}),
        },
    ),
    "delta": (
        (1024, 8, 2048),
        {
            "mamba2": ("mamba2", {}),
            "retnet": ("retnet", {}),
            "deltanet": ("deltanet", {}),
            "gated_deltanet": ("gated_deltanet", {}),
        },
    ),
    "linear systems": (
        (1024, 8, 2048),
        {
            "mamba": ("mamba", {}),
            "s4d": ("s4d", {}),
            "s4": ("s4", {}),
            "h3": ("h3", {}),
            "hyena": ("hyena", {}),
        },
    ),
}


def define(flag_values: flags.FlagValues, argv: list[str]) -> None:
    flags.DEFINE_string("groups", ",".join(GROUPS), "Groups of rows, apart by commas.", flag_values=flag_values)
    for name, meaning in (("width", "Width D"), ("batch", "Rows B"), ("length", "Tokens T of a row")):
        flags.DEFINE_integer(name, 0, f"{meaning}; 0: the group's.", flag_values=flag_values)
    flags.DEFINE_string("dtype", "bfloat16", "Dtype of the products.", flag_values=flag_values)
    flags.DEFINE_integer("repeats", 5, "Timings, of which the median counts.", flag_values=flag_values)
    flags.DEFINE_string("out", "", "File of results; by device if left out.", flag_values=flag_values)


def main(flag_values: flags.FlagValues) -> int:
    cli.use_platform("")
    for group in flag_values.groups.split(","):
        if group not in GROUPS:
            raise UserError(f"--groups={group}: there are {', '.join(GROUPS)}")
        (width, batch, length), rows = GROUPS[group]
        shape = dict(
            width=flag_values.width or width, batch=flag_values.batch or batch, length=flag_values.length or length
        )
        measure_group(group, rows, dict(**shape, dtype=flag_values.dtype), flag_values.repeats, flag_values.out)
    return 0


def measure_group(group: str, rows: dict[str, tuple[str, dict]], shape: dict[str, Any], repeats: int, out: str) -> None:
    """Compile all rows side by side, then time, record and print them one after the other."""
    lowered = {name: lower(word, fields, **shape) for name, (word, fields) in rows.items()}
    with futures.ThreadPoolExecutor() as pool:
        compiling = {name: [pool.submit(one.compile) for one in pair] for name, (_, *pair) in lowered.items()}
    mark = None
    for name, (word, fields) in rows.items():
        row = dict(group=group, row=name, branch=word, fields=fields, **shape)
        try:
            result = row | time_row(lowered[name][0], *(future.result() for future in compiling[name]), repeats)
        except Exception as error:  # a row that does not fit into memory leaves the others
            print(f"{group:8} {name:34} failed: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
            continue
        mark = mark or result
        path = Path(out or RESULTS / f"branches_{slug(result['device'])}.json")
        record(path, result, key=("group", "row", "width", "batch", "length", "dtype", "device"))
        print(
            f"{group:8} {name:34} forward {result['forward_ms']:8.3f} ms, with backward {result['ms']:8.3f} ms "
            f"({result['ms'] / mark['ms']:.2f} x), {result['temporary_gib']:.2f} GiB",
            flush=True,
        )


def lower(word: str, fields: dict[str, Any], width: int, batch: int, length: int, dtype: str) -> tuple[Any, ...]:
    """A function that makes the arguments of a branch, and its forward pass and both passes, lowered."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from seqmodels.backbone import branch_of
    from seqmodels.config import complete_model
    from seqmodels.sequence import make_sequence

    model = complete_model({"pattern": word, "width": width, "dtype": dtype})
    model.update_from_flattened_dict(fields)
    branch = branch_of(model, word)
    seq, _, _ = make_sequence(batch, length)

    def arguments():
        x, dy = (jax.random.normal(jax.random.key(i), (batch, length, width), jnp.dtype(dtype)) for i in range(2))
        return nn.unbox(branch.init(jax.random.key(2), x, seq))["params"], x, dy

    def forward(params, x, dy):
        return branch.apply({"params": params}, x, seq)[0]

    def both(params, x, dy):
        y, pull = jax.vjp(lambda params, x: forward(params, x, dy), params, x)
        return y, pull(dy)

    shapes = jax.eval_shape(arguments)
    return arguments, jax.jit(forward).lower(*shapes), jax.jit(both).lower(*shapes)


def time_row(arguments: Any, forward: Any, both: Any, repeats: int) -> dict[str, Any]:
    """Milliseconds of a branch's forward pass and of both passes, and the temporary memory of the latter."""
    import jax

    from benchmarks import rates

    inputs = jax.jit(arguments)()
    device = jax.devices()[0]

    def milliseconds(compiled):
        return round(1e3 * rates.measure(lambda inputs: compiled(*inputs), [inputs], repeats), 4)

    return dict(
        forward_ms=milliseconds(forward),
        ms=milliseconds(both),
        temporary_gib=round(both.memory_analysis().temp_size_in_bytes / 2**30, 3),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(inputs[0])),
        device=device_name(device),
        jax=jax.__version__,
        date=datetime.date.today().isoformat(),
        commit=commit(),
    )


if __name__ == "__main__":
    sys.exit(cli.run(main, define, __doc__))
