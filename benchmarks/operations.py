"""The operations that benchmarks/kernels.py checks and times: arguments, variants, shapes and arithmetic of each.

A new operation is one more entry of `OPERATIONS`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from seqmodels.kernels import attn_residual, dispatch
from seqmodels.kernels.delta_rule import delta_rule
from seqmodels.kernels.hyper_connection import hyper_connection
from seqmodels.kernels.linear_attention import linear_attention
from seqmodels.kernels.linear_scan import linear_scan
from seqmodels.kernels.selective_scan import selective_scan
from seqmodels.kernels.short_conv import short_conv


@dataclasses.dataclass(frozen=True)
class Argument:
    """An array of an operation.

    Attributes:
        axes: one letter per axis; `Operation.sizes` gives its size.
        draw: function from a key and a shape to random float32 values.
        low: whether it has the dtype under test. Else it is float32.
        fixed: whether it has no gradient.
    """

    axes: str
    draw: Callable
    low: bool = True
    fixed: bool = False


@dataclasses.dataclass(frozen=True)
class Operation:
    """Description of an operation, as needed to check and to time it.

    Attributes:
        letters: letters of the numbers in a shape, such as "BTEN".
        apart: axes whose indices the operation processes independently, so that some of them can be checked alone;
            the longest axis comes last.
        sizes: maps (shape, variant) to the size of each letter. Raises ValueError for an unknown variant.
        arguments: maps a variant to its arrays by name. All are differentiated except fixed ones.
        outputs: maps a variant to the axes of each output by name.
        call: maps (arguments, variant, implementation) to the outputs by name.
        exps: maps sizes to the exponentials of the forward pass. The backward pass saves none and computes them again.
        flops: maps sizes to the flops of the matrix products in the forward and in the backward pass.
        shapes: names of groups of shapes. "small" is for CPUs, "table" for accelerators.
        carried: maps an argument to the output that replaces it in the next call: the state.
        work: letters whose sizes, multiplied, are the work of the reference.
        peers: what `call` takes for `implementation` beside the implementations: other code that computes the same.
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
    flops: Callable[[dict[str, int]], tuple[float, float]] = lambda sizes: (0, 0)
    peers: tuple[str, ...] = ()


def normal(key, shape, scale=1.0):
    """Normal with standard deviation `scale`."""
    return scale * jax.random.normal(key, shape)


def log_steps(key, shape):
    """Logarithms of Mamba's initial steps dt, log-uniform in [1e-3, 1e-1]."""
    return jax.random.uniform(key, shape, minval=math.log(1e-3), maxval=math.log(1e-1))


def steps(key, shape):
    """Mamba's initial steps dt."""
    return jnp.exp(log_steps(key, shape))


def step_biases(key, shape):
    """softplus^-1 of Mamba's initial steps dt."""
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


HEAD_VARIANTS = ("ssd", "retention", "linear", "gla")


def head_decays(key, shape):
    """Mamba-2's initial log decays: -dt A, with A in [1, 16] for each head."""
    return -steps(key, shape) * jax.random.uniform(jax.random.fold_in(key, 1), shape[-1:], minval=1, maxval=16)


def channel_decays(key, shape):
    """GLA's log decays: log sigmoid of a normal number, divided by 16."""
    return jax.nn.log_sigmoid(normal(key, shape)) / 16


def retention_decays(key, shape):
    """RetNet's log decays: log(1 - 2^(-5 - h)) of head h."""
    return jnp.log1p(-(2.0 ** (-5 - jnp.arange(shape[0], dtype=jnp.float32))))


def attention_sizes(shape, variant):
    if variant not in HEAD_VARIANTS:
        raise ValueError(f"variant {variant!r} of linear_attention is none of {', '.join(HEAD_VARIANTS)}")
    sizes = dict(zip("BTHKV", shape, strict=True))
    return sizes | dict(G=1 if variant == "ssd" else sizes["H"])


def attention_arguments(variant):
    keys = "BTGK" if variant == "ssd" else "BTHK"  # Mamba-2's heads share their keys
    arguments = dict(q=Argument(keys, normal), k=Argument(keys, normal), v=Argument("BTHV", normal))
    if variant == "ssd":
        arguments["log_decay"] = Argument("BTH", head_decays, low=False)
    if variant == "retention":
        arguments["log_decay"] = Argument("H", retention_decays, low=False, fixed=True)
    if variant == "gla":
        arguments["log_decay"] = Argument("BTHK", channel_decays, low=False)
    return arguments | dict(initial_state=Argument("BHKV", normal, low=False))


def attention_call(arguments, variant, implementation):
    scale = 1.0 if variant == "ssd" else arguments["k"].shape[-1] ** -0.5
    y, state = linear_attention(**arguments, scale=scale, implementation=implementation)
    return dict(y=y, state=state)


def attention_flops(sizes):
    """Two for each multiply-add, over chunks of 64 tokens, which is the number of rows of one tensor core instruction.

    The forward pass has the scores of the groups (K), their products with values (V), and reads and writes of the state
    (K V). The backward pass has the scores again, and the gradients of both factors of each product. Recomputing states
    does not count.
    """
    tokens, chunk = sizes["B"] * sizes["T"], min(64, sizes["T"])
    scores, values = chunk * sizes["G"] * sizes["K"], chunk * sizes["H"] * sizes["V"]
    states = sizes["H"] * sizes["K"] * sizes["V"]
    return 2 * tokens * (scores + values + 2 * states), 2 * tokens * (3 * scores + 2 * values + 4 * states)


DELTA_VARIANTS = ("deltanet", "gated", "kda")


def unit_keys(key, shape):
    """Keys and queries of the norm one, as mixers with the delta rule make them."""
    x = normal(key, shape)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def delta_sizes(shape, variant):
    if variant not in DELTA_VARIANTS:
        raise ValueError(f"variant {variant!r} of delta_rule is none of {', '.join(DELTA_VARIANTS)}")
    return dict(zip("BTHKV", shape, strict=True))


def delta_arguments(variant):
    arguments = dict(q=Argument("BTHK", unit_keys), k=Argument("BTHK", unit_keys), v=Argument("BTHV", normal))
    arguments["beta"] = Argument("BTH", jax.random.uniform, low=False)
    if variant == "gated":
        arguments["log_decay"] = Argument("BTH", head_decays, low=False)
    if variant == "kda":
        arguments["log_decay"] = Argument("BTHK", channel_decays, low=False)
    return arguments | dict(initial_state=Argument("BHKV", normal, low=False))


def delta_call(arguments, variant, implementation):
    """As the mixers call it: the step and the decay are factors of keys."""
    q, k, v, beta, state = (arguments[name] for name in ("q", "k", "v", "beta", "initial_state"))
    logs = arguments.get("log_decay")
    written, seen = (beta[..., None] * k).astype(k.dtype), k
    if logs is not None:
        seen = (jnp.exp(logs if logs.ndim == 4 else logs[..., None]) * k).astype(k.dtype)
    options = dict(scale=k.shape[-1] ** -0.5, initial_state=state, implementation=implementation)
    y, state = delta_rule(q, written, v, None, seen, logs, **options)
    return dict(y=y, state=state)


def delta_flops(sizes):
    """Two for each multiply-add, over chunks of 64 tokens.

    The forward pass has the scores of queries and of keys, and the inverse of the triangular system times keys (3 K);
    the inverse times values, and the scores times corrected values (2 V); and two reads and a write of the state
    (3 K V). The inverses themselves do not count. The backward pass has the gradients of both factors of each product.
    """
    tokens, chunk, keys, values = sizes["B"] * sizes["T"], min(64, sizes["T"]), sizes["K"], sizes["V"]
    forward = 2 * tokens * sizes["H"] * (chunk * (3 * keys + 2 * values) + 3 * keys * values)
    return forward, 2 * forward


def gate_decays(key, shape):
    """HGRN's log decays: log sigmoid of a normal number."""
    return jax.nn.log_sigmoid(normal(key, shape))


def diagonal_arguments(variant):
    if variant not in ("hgrn", "hgrn16"):
        raise ValueError(f"variant {variant!r} of linear_scan is none of hgrn, hgrn16")
    return dict(
        log_decay=Argument("BTD", gate_decays, low=variant == "hgrn16"),
        x=Argument("BTD", normal),
        initial_state=Argument("BD", normal, low=False),
    )


def diagonal_call(arguments, variant, implementation):
    scan = associative_scan if implementation == "associative_scan" else linear_scan
    options = {} if scan is associative_scan else dict(implementation=implementation)
    h, state = scan(**arguments, **options)
    return dict(h=h, state=state)


def associative_scan(log_decay, x, initial_state):
    """The linear scan as users of jax write it, in float32."""

    def join(first, second):
        return second[0] * first[0], second[0] * first[1] + second[1]

    decay, added = jnp.exp(log_decay.astype(initial_state.dtype)), x.astype(initial_state.dtype)
    added = added.at[:, 0].add(decay[:, 0] * initial_state)
    _, h = jax.lax.associative_scan(join, (decay, added), axis=1)
    return h.astype(x.dtype), h[:, -1]


def streams_arguments(variant):
    if variant != "identity":
        raise ValueError(f"variant {variant!r} of hyper_connection is not identity")
    return dict(
        streams=Argument("BTCD", normal),
        y=Argument("BTD", normal),
        weights=Argument("BTC", normal, low=False),
        matrix=Argument("CDK", functools.partial(normal, scale=0.02)),
        scale=Argument("P", normal, low=False),
        pre_bias=Argument("C", normal, low=False),
        post_bias=Argument("C", normal, low=False),
    )


def streams_call(arguments, variant, implementation):
    new, u, post = hyper_connection(**arguments, eps=1e-5, implementation=implementation)
    return dict(new=new, u=u, post=post.astype(u.dtype))


def source_sizes(shape, variant):
    if not variant.isdecimal() or not int(variant):
        raise ValueError(f"variant {variant!r} of attn_residual is no number of steps that read the source")
    return dict(zip("BTD", shape, strict=True), K=int(variant))


def source_arguments(variant):
    """Those of the source's gradient, which is what the backends differ in; the gradient of a gradient has no use."""
    fixed = functools.partial(Argument, draw=normal, fixed=True)
    reads = {f"read_{k}": fixed("BTD") for k in range(int(variant))}
    numbers = dict(scores=fixed("KBT", low=False), weights=fixed("KBT", low=False), offsets=fixed("KBT", low=False))
    return dict(value=fixed("BTD"), vectors=fixed("KD"), reciprocal=fixed("BT", low=False), **numbers, **reads)


def source_call(arguments, variant, implementation):
    arguments = dict(arguments)
    reads = tuple(arguments.pop(f"read_{k}") for k in range(int(variant)))
    facts = dict(shape=(*arguments["value"].shape, len(reads)), dtype=arguments["value"].dtype)
    backend = dispatch.require("attn_residual", attn_residual.BACKENDS, implementation, **facts)
    dvalue, dproducts = backend.gradient(**arguments, reads=reads)
    return dict(value=dvalue, products=dproducts)


OPERATIONS = {
    "selective_scan": Operation(
        letters="BTEN",
        apart="BE",
        sizes=scan_sizes,
        arguments=scan_arguments,
        outputs=lambda variant: dict(y="BTE", state="BGEN" if scan_groups(variant) > 1 else "BEN"),
        call=scan_call,
        # one for the decay of every state, one for softplus, one for the gate
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
            few=("1x4x1536x16:full", *(f"64x{t}x2048x16:full" for t in (2, 4, 8)), "64x1x2048x16:read3"),
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
    "linear_attention": Operation(
        letters="BTHKV",
        apart="BHV",
        sizes=attention_sizes,
        arguments=attention_arguments,
        outputs=lambda variant: dict(y="BTHV", state="BHKV"),
        call=attention_call,
        exps=lambda s: 0,  # at least one per token; not counted
        flops=attention_flops,
        shapes=dict(
            table=(
                "8x2048x32x128x64:ssd",
                "8x2048x64x128x64:ssd",
                "1x65536x32x128x64:ssd",
                "8x2048x4x256x512:retention",
                "8x2048x8x128x256:retention",
            ),
            others=("8x2048x2x384x1536:retention", "8x2048x16x64x64:linear", "8x2048x4x128x256:gla"),
            decode=tuple(f"{b}x1x{h}x128x64:ssd" for b in (1, 64, 128) for h in (24, 32, 64)),
            small=(
                "2x256x4x32x16:ssd",
                "1x200x2x24x40:retention",
                "1x100x2x16x8:linear",
                "1x96x2x16x24:gla",
                "4x1x4x32x16:ssd",
            ),
        ),
        work="BTHKV",
        carried=dict(initial_state="state"),
    ),
    "delta_rule": Operation(
        letters="BTHKV",
        apart="BHV",
        sizes=delta_sizes,
        arguments=delta_arguments,
        outputs=lambda variant: dict(y="BTHV", state="BHKV"),
        call=delta_call,
        exps=lambda s: 0,  # at least one per token; not counted
        flops=delta_flops,
        shapes=dict(
            table=("8x2048x16x128x128:deltanet", "8x2048x32x128x128:gated", "8x2048x6x256x512:gated"),
            others=("8x2048x16x128x128:kda",),
            decode=tuple(f"{b}x1x32x128x128:gated" for b in (1, 64, 128)),
            small=("2x256x4x32x16:gated", "1x200x2x24x40:deltanet", "1x96x2x16x24:kda", "4x1x4x32x16:gated"),
        ),
        work="BTHKV",
        carried=dict(initial_state="state"),
    ),
    "linear_scan": Operation(
        letters="BTD",
        apart="BD",
        sizes=lambda shape, variant: dict(zip("BTD", shape, strict=True)),
        arguments=diagonal_arguments,
        outputs=lambda variant: dict(h="BTD", state="BD"),
        call=diagonal_call,
        exps=lambda s: s["B"] * s["T"] * s["D"],
        shapes=dict(
            table=("8x2048x4096:hgrn", "8x2048x4096:hgrn16", "1x65536x4096:hgrn", "1x262144x1024:hgrn"),
            decode=tuple(f"{b}x1x4096:hgrn" for b in (1, 64, 128)),
            small=("2x256x64:hgrn", "1x500x24:hgrn16", "4x1x128:hgrn"),
        ),
        work="BTD",
        carried=dict(initial_state="state"),
        peers=("associative_scan",),
    ),
    "hyper_connection": Operation(
        letters="BTCD",
        apart="BT",
        sizes=lambda shape, variant: dict(zip("BTCD", shape, strict=True), K=2 * shape[2], P=2),
        arguments=streams_arguments,
        outputs=lambda variant: dict(new="BTCD", u="BTD", post="BTC"),
        call=streams_call,
        exps=lambda s: s["B"] * s["T"] * s["K"],
        shapes=dict(
            table=("8x2048x4x768:identity", "8x2048x4x1024:identity", "8x2048x4x2048:identity"),
            small=("2x64x4x64:identity", "1x50x3x24:identity"),
        ),
        work="BTCD",
        carried={},
    ),
    "attn_residual": Operation(
        letters="BTD",
        apart="BT",
        sizes=source_sizes,
        arguments=source_arguments,
        outputs=lambda variant: dict(value="BTD", products="KBT"),
        call=source_call,
        exps=lambda s: 0,
        shapes=dict(
            table=("8x2048x768:24", "8x2048x768:12", "8x2048x768:3", "8x2048x1536:24"),
            small=("2x64x64:3", "1x50x96:5"),
        ),
        work="BTD",
        carried={},
    ),
}
