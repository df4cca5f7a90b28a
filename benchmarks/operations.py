"""The operations that benchmarks/kernels.py checks and times: arguments, variants, shapes and exponentials of each.

A new operation is one more entry of `OPERATIONS`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.selective_scan import selective_scan
from kernels.short_conv import short_conv


@dataclasses.dataclass(frozen=True)
class Argument:
    """An array of an operation.

    Attributes:
        axes: a letter an axis, whose size `Operation.sizes` gives.
        draw: random values from a key and a shape, float32.
        low: whether it has the dtype under test; else it is float32.
    """

    axes: str
    draw: Callable
    low: bool = True


@dataclasses.dataclass(frozen=True)
class Operation:
    """What there is to know of an operation to check and to time it.

    Attributes:
        letters: of the numbers in a shape, such as "BTEN".
        apart: axes along which the operation works for each index by itself, so that some of them can be checked alone.
        sizes: (shape, variant) to the size of each letter. Raises ValueError for an unknown variant.
        arguments: variant to its arrays by name; all are differentiated.
        outputs: variant to the axes of each output by name.
        call: (arguments, variant, implementation) to the outputs by name.
        exps: sizes to exponentials of the forward pass; the backward pass, which keeps none, takes them again.
        shapes: names of shapes that are asked for together. "small" is for CPUs, "table" for accelerators.
        carried: argument to the output that takes its place in the next call: the state.
        work: letters whose sizes multiplied are the work of the reference.
    """

    letters: str
    apart: str
    sizes: Callable[[tuple[int, ...], str], dict[str, int]]
    arguments: Callable[[str], dict[str, Argument]]
    outputs: Callable[[str], dict[str, str]]
    call: Callable
    exps: Callable[[dict[str, int]], float]
    shapes: dict[str, tuple[str, ...]]
    work: str
    carried: dict[str, str]


def normal(key, shape, scale=1.0):
    """Normal with standard deviation `scale`."""
    return scale * jax.random.normal(key, shape)


def log_steps(key, shape):
    """Logarithms of Mamba's first steps dt, log-uniform in [1e-3, 1e-1]."""
    return jax.random.uniform(key, shape, minval=math.log(1e-3), maxval=math.log(1e-1))


def steps(key, shape):
    """Mamba's first steps dt."""
    return jnp.exp(log_steps(key, shape))


def step_biases(key, shape):
    """softplus^-1 of Mamba's first steps dt."""
    step = steps(key, shape)
    return step + jnp.log(-jnp.expm1(-step))


def rates(key, shape):
    """Mamba's A: -(1..N) in every channel, each times a random factor near one."""
    return -jnp.arange(1, shape[-1] + 1) * jnp.exp(normal(key, shape, 0.3))


def scan_groups(variant: str) -> int:
    """G of a variant of the selective scan."""
    match = re.fullmatch(r"full|bare|read([2-9])", variant)
    if not match:
        raise ValueError(f"variant {variant!r} of selective_scan is none of full, bare, read2 to read9")
    return int(match[1] or 1)


def scan_sizes(shape, variant):
    groups = scan_groups(variant)
    return dict(zip("BTEN", shape, strict=True), G=groups, S=groups - 1)


def scan_arguments(variant):
    group = "G" if scan_groups(variant) > 1 else ""
    small = functools.partial(normal, scale=0.5)
    arguments = dict(
        u=Argument(f"BT{group}E", normal),
        dt=Argument(f"BT{group}E", steps if variant == "bare" else small),
        A=Argument(f"{group}EN", rates, low=False),
        B=Argument(f"BT{group}N", normal),
        C=Argument(f"BT{group}N", normal),
        initial_state=Argument(f"B{group}EN", normal, low=False),
    )
    if variant != "bare":
        arguments |= dict(
            D=Argument("E", normal, low=False),
            z=Argument("BTE", normal),
            dt_bias=Argument(f"{group}E", step_biases, low=False),
        )
    if group:
        arguments["weights"] = Argument("BTSE", small)
    return arguments


def scan_call(arguments, variant, implementation):
    y, state = selective_scan(**arguments, dt_softplus=variant != "bare", implementation=implementation)
    return dict(y=y, state=state)


def conv_arguments(variant):
    if variant not in ("silu", "linear"):
        raise ValueError(f"variant {variant!r} of short_conv is none of silu, linear")
    return dict(
        x=Argument("BTE", normal),
        weight=Argument("WE", normal, low=False),
        bias=Argument("E", normal, low=False),
        initial_state=Argument("BPE", normal, low=False),
    )


def conv_call(arguments, variant, implementation):
    activation = "silu" if variant == "silu" else None
    y, state = short_conv(**arguments, activation=activation, implementation=implementation)
    return dict(y=y, state=state)


OPERATIONS = {
    "selective_scan": Operation(
        letters="BTEN",
        apart="BE",
        sizes=scan_sizes,
        arguments=scan_arguments,
        outputs=lambda variant: dict(y="BTE", state="BGEN" if scan_groups(variant) > 1 else "BEN"),
        call=scan_call,
        # decays of every state, one of softplus, one of the gate
        exps=lambda s: s["B"] * s["T"] * s["E"] * (s["G"] * (s["N"] + 1) + 1),
        shapes=dict(
            table=(
                "8x2048x2048x16:full",
                "2x8192x2048x16:full",
                "1x65536x2048x16:full",
                "1x262144x2048x16:full",
                "8x2048x2048x16:bare",
                "8x2048x2048x16:read3",
                "8x2048x1536x16:full",
                "8x2048x4096x16:full",
            ),
            decode=tuple(f"{b}x1x{e}x16:full" for b in (1, 64, 128) for e in (1536, 2048, 4096)),
            small=("2x256x64x16:full", "1x500x24x8:bare", "2x128x32x16:read3", "4x1x128x16:full"),
        ),
        work="BTEGN",
        carried=dict(initial_state="state"),
    ),
    "short_conv": Operation(
        letters="BTEW",
        apart="BE",
        sizes=lambda shape, variant: dict(zip("BTEW", shape, strict=True), P=shape[-1] - 1),
        arguments=conv_arguments,
        outputs=lambda variant: dict(y="BTE", state="BPE"),
        call=conv_call,
        exps=lambda s: s["B"] * s["T"] * s["E"],
        shapes=dict(
            table=("8x2048x2048x4:silu", "8x2048x1536x4:silu", "2x2048x4096x4:silu", "1x262144x2048x4:silu"),
            decode=tuple(f"{b}x1x{e}x4:silu" for b in (1, 64, 128) for e in (1536, 2048, 4096)),
            small=("2x256x64x4:silu", "1x500x24x3:silu", "4x1x128x4:silu"),
        ),
        work="BTEW",
        carried=dict(initial_state="state"),
    ),
}
