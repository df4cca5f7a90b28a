"""Random arguments of each operation, by name."""

import numpy as np


def selective_scan_inputs(batch=2, length=9, groups=1, width=5, state=4, seed=0, dtype=np.float32) -> dict:
    """Every optional one given; groups == 0 leaves the group axis out."""
    draw = np.random.default_rng(seed)
    group = (groups,) if groups else ()
    args = dict(
        u=draw.normal(size=(batch, length, *group, width)),
        dt=draw.normal(size=(batch, length, *group, width)),
        A=-np.exp(draw.normal(size=(*group, width, state))),
        B=draw.normal(size=(batch, length, *group, state)),
        C=draw.normal(size=(batch, length, *group, state)),
        D=draw.normal(size=width),
        z=draw.normal(size=(batch, length, width)),
        dt_bias=draw.normal(size=(*group, width)) * 0.3,
        initial_state=draw.normal(size=(batch, *group, width, state)),
    )
    if groups > 1:
        args["weights"] = draw.normal(size=(batch, length, groups - 1, width))
    return {name: np.asarray(value, dtype) for name, value in args.items()}


def linear_attention_inputs(
    batch=2,
    length=11,
    groups=2,
    heads=4,
    keys=3,
    values=5,
    decay="head",
    bonus=False,
    normalise=False,
    rate=0.3,
    seed=0,
    dtype=np.float32,
) -> dict:
    """The initial state given; with `normalise` such that the normaliser is no difference."""
    draw = np.random.default_rng(seed)
    args = dict(
        q=draw.normal(size=(batch, length, groups, keys)),
        k=draw.normal(size=(batch, length, groups, keys)),
        v=draw.normal(size=(batch, length, heads, values)),
        initial_state=draw.normal(size=(batch, heads, keys, values + normalise)),
    )
    if normalise:
        args |= dict(q=np.abs(args["q"]) + 0.1, k=np.abs(args["k"]) + 0.1)
        args["initial_state"][..., -1] = np.abs(args["initial_state"][..., -1]) + 1
    shape = dict(constant=(heads,), head=(batch, length, heads), channel=(batch, length, heads, keys))
    if decay != "none":
        args["log_decay"] = -rate * np.abs(draw.normal(size=shape[decay]))
    if bonus:
        args["bonus"] = draw.normal(size=(heads, keys))
    return {name: np.asarray(value, dtype) for name, value in args.items()}


def delta_rule_inputs(
    batch=2,
    length=11,
    groups=2,
    heads=4,
    keys=3,
    values=5,
    decay="head",
    own="a",
    rate=0.3,
    seed=0,
    dtype=np.float32,
) -> dict:
    """The initial state given; `own`: which of k, a and b have heads of their own. States stay of the size of one."""
    draw = np.random.default_rng(seed)
    shape = {name: (batch, length, heads if name in own else groups, keys) for name in "qkab"}
    args = {name: draw.normal(size=shape[name]) for name in "qk"} | dict(
        v=draw.normal(size=(batch, length, heads, values))
    )
    args |= {name: 0.6 * draw.normal(size=shape[name]) * keys**-0.5 for name in "ab"}
    args["initial_state"] = draw.normal(size=(batch, heads, keys, values))
    shape = dict(head=(batch, length, heads), channel=(batch, length, heads, keys))
    if decay != "none":
        args["log_decay"] = -rate * np.abs(draw.normal(size=shape[decay]))
    return {name: np.asarray(value, dtype) for name, value in args.items()}


def linear_scan_inputs(batch=2, length=11, width=5, rate=0.3, seed=0, dtype=np.float32) -> dict:
    """The initial state given. A complex dtype: decays that rotate. `width` may be several axes."""
    draw = np.random.default_rng(seed)
    channels = (width,) if isinstance(width, int) else width
    shape = (batch, length, *channels)

    def normal(shape):
        x = draw.normal(size=shape)
        return x + 1j * draw.normal(size=shape) if np.issubdtype(dtype, np.complexfloating) else x

    rotation = 1j * np.imag(normal(shape))
    logs = -rate * np.abs(draw.normal(size=shape)) + (rotation if rotation.any() else 0)
    args = dict(log_decay=logs, x=normal(shape), initial_state=normal((batch, *channels)))
    return {name: np.asarray(value, dtype) for name, value in args.items()}


def short_conv_inputs(taps=4, length=9, seed=0, dtype=np.float32, batch=3, width=5) -> dict:
    """Bias and state given."""
    draw = np.random.default_rng(seed)
    args = dict(
        x=draw.normal(size=(batch, length, width)),
        weight=draw.normal(size=(taps, width)),
        bias=draw.normal(size=width),
        initial_state=draw.normal(size=(batch, taps - 1, width)),
    )
    return {name: np.asarray(value, dtype) for name, value in args.items()}


def extreme_decays(shape, seed=3) -> np.ndarray:
    """Log decays: none, all gone at once, and in between."""
    draw = np.random.default_rng(seed)
    return np.float32(draw.choice([0.0, -1e4, -3e-5, -0.4], shape, p=[0.4, 0.1, 0.3, 0.2]))
