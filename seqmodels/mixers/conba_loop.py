"""The loop of sequential Conba, one token after the other, as pure functions. The mixer is in conba_seq.py.

States are [..., N, E] inside this file, and the gain is transposed: K e is e @ gain.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from seqmodels.kernels.arrays import expand_to, join_time, split_time
from seqmodels.kernels.segments import forget
from seqmodels.mixers import conba_state
from seqmodels.mixers.conba_gain import unit
from seqmodels.mixers.conba_state import mix, read, rescale

STEEPEST = 1.0999  # largest slope of swish, rounded up
CONTRACTION = 0.999  # limit of the Lipschitz constant with stability="spectral"

State = dict[str, Any]


@struct.dataclass
class Mlp:
    """x to outward swish(inward x + inward_bias) + outward_bias: [4N, N], [4N], [N, 4N], [N]."""

    inward: jax.Array
    inward_bias: jax.Array
    outward: jax.Array
    outward_bias: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., N, E]."""
        hidden = jax.nn.silu(mix(self.inward, x) + self.inward_bias[:, None])
        return mix(self.outward, hidden) + self.outward_bias[:, None]

    def lipschitz(self) -> jax.Array:
        """A bound of the Lipschitz constant."""
        return jnp.linalg.norm(self.inward, 2) * jnp.linalg.norm(self.outward, 2) * STEEPEST


@struct.dataclass
class Loop:
    """The parameters of the loop.

    Attributes:
        A: [E, N]; dt_proj: [R, E]; dt_bias: [E], as Mamba's.
        F, f: [N, N] and [N] of a linear f_d; fd: of an MLP. Neither: f_d is the identity.
        h: of the readout's MLP, over the P channels of a head. None: h is the identity.
        Z, g: [N, N] and [N], of the scaling; None with scaling "off".
        base: [H, P, P] and authority: [H]; None without control.
        scaling: "gate", "literal" or "off". rule: "nlms", "published" or "mit". stability: "none" or "spectral".
        noise: standard deviation of the noise on the state.
    """

    A: jax.Array
    dt_proj: jax.Array
    dt_bias: jax.Array
    F: jax.Array | None = None
    f: jax.Array | None = None
    fd: Mlp | None = None
    h: Mlp | None = None
    Z: jax.Array | None = None
    g: jax.Array | None = None
    base: jax.Array | None = None
    authority: jax.Array | None = None
    scaling: str = struct.field(pytree_node=False, default="gate")
    rule: str = struct.field(pytree_node=False, default="nlms")
    stability: str = struct.field(pytree_node=False, default="none")
    noise: float = struct.field(pytree_node=False, default=0.0)


@struct.dataclass
class Tokens:
    """One array a token, [B, T, ...] (inside a step [B, ...]).

    u [E], delta [R], B [N], C [N]; reference r u [E], step beta [H] and log_memory log lambda [H] (None: no leak) of
    control, or None without; observation noise [E] or None; reset and mask, bool or None. write [N, E]: process noise.
    """

    u: jax.Array
    delta: jax.Array
    B: jax.Array
    C: jax.Array
    reference: jax.Array | None = None
    step: jax.Array | None = None
    log_memory: jax.Array | None = None
    noise: jax.Array | None = None
    reset: jax.Array | None = None
    mask: jax.Array | None = None
    write: jax.Array | None = None


def contracted(loop: Loop) -> Loop:
    """The loop with Z made so small that x -> R(f_d(x)) is a contraction, in the norm of each channel's N numbers.

    Swish(Z f_d(x) + g) has at most the Lipschitz constant STEEPEST |Z| Lip(f_d), and the decays are below 1.
    """
    if loop.Z is None or loop.stability == "none":
        return loop
    inner: Any = 1.0
    if loop.fd is not None:
        inner = loop.fd.lipschitz()
    elif loop.F is not None:
        inner = jnp.linalg.norm(loop.F, 2)
    limit = CONTRACTION / (STEEPEST * jnp.maximum(inner, 1e-6))
    return dataclasses.replace(loop, Z=loop.Z * (limit / jnp.maximum(jnp.linalg.norm(loop.Z, 2), limit)))


def transform(v: jax.Array, loop: Loop) -> jax.Array:
    """R(f_d(v)) of v [..., N, E]."""
    if loop.fd is not None:
        v = loop.fd(v)
    elif loop.F is not None and loop.f is not None:
        v = mix(loop.F, v) + loop.f[:, None]
    return rescale(v, loop.Z, loop.g, loop.scaling)


def observe(y: jax.Array, loop: Loop, size: int) -> jax.Array:
    """h of y [B, E], whose heads have `size` channels."""
    if loop.h is None:
        return y
    by_head = y.reshape(len(y), -1, size)
    return jnp.swapaxes(loop.h(jnp.swapaxes(by_head, 1, 2)), 1, 2).reshape(y.shape)


def advance(loop: Loop, size: int, state: State, token: Tokens) -> tuple[State, jax.Array]:
    """One token: the new state, and h(x_t C_t) [B, E]. Heads have `size` channels.

    state: ssm [B, N, E]; with control gain [B, H, P, P]; with rule "mit" error [B, H, P] and sensitivity [B, N, E].
    """
    old = {name: forget(value, token.reset) for name, value in state.items()}
    new = {}
    dt = jax.nn.softplus((token.delta @ loop.dt_proj).astype(loop.A.dtype) + loop.dt_bias)
    u, B, C = (x.astype(dt.dtype) for x in (token.u, token.B, token.C))
    into = dt[:, None, :] * B[:, :, None]  # derivative of v by u
    if loop.base is not None:
        assert loop.authority is not None and token.reference is not None
        seen = observe(read(old["ssm"], C), loop, size)
        seen = seen if token.noise is None else seen + token.noise
        e = (seen - token.reference).reshape(len(u), -1, size)
        gain = old["gain"]
        if loop.rule == "mit":
            assert token.step is not None
            gain = gain - token.step[:, :, None, None] * mit_gradient(old, e, C, loop, size)
        u = u - (loop.authority[:, None] * corrections(e, loop.base, gain)).reshape(u.shape)
        new["gain"] = adapted(gain, e, token, loop)
    v = jnp.exp(dt[:, None, :] * loop.A.T) * old["ssm"] + u[:, None, :] * into
    v = v if token.write is None else v + token.write
    if loop.base is not None and loop.rule == "mit":
        new["ssm"], new["sensitivity"] = jax.jvp(lambda v: transform(v, loop), (v,), (into,))
        new["error"] = e
    else:
        new["ssm"] = transform(v, loop)
    if token.mask is not None:
        new = {name: jnp.where(expand_to(token.mask, x.ndim), x, state[name]) for name, x in new.items()}
    y = observe(read(new["ssm"], C), loop, size)
    return new, y if token.noise is None else y + token.noise


def corrections(e: jax.Array, base: jax.Array, gain: jax.Array) -> jax.Array:
    """(K_base + K) e of e [B, H, P], base [H, P, P] and the transposed K [B, H, P, P]."""
    fixed = jnp.einsum("hpq,bhq->bhp", base, e, precision="highest")
    return fixed + jnp.einsum("bhq,bhqp->bhp", e, gain, precision="highest")


def adapted(gain: jax.Array, e: jax.Array, token: Tokens, loop: Loop) -> jax.Array:
    """The transposed gain [B, H, P, P] after the token, by the rules that know the step already ("mit" does not)."""
    if loop.rule == "mit":
        return gain
    assert token.step is not None and loop.base is not None
    step = token.step[..., None]
    if loop.rule == "published":
        return gain - (step * e)[..., None] * e[..., None, :]
    key = unit(e)
    assert token.log_memory is not None
    missing = key - corrections(key, loop.base, gain)
    return jnp.exp(token.log_memory)[..., None, None] * gain + (step * key)[..., None] * missing[..., None, :]


def mit_gradient(old: State, e: jax.Array, C: jax.Array, loop: Loop, size: int) -> jax.Array:
    """The gradient of |e_t|^2 by the transposed gain of the token before, [B, H, P, P].

    Token t - 1 had the input u - gamma K e, so e_t = h(x_{t-1} C_t) - r u_t depends on K through x_{t-1}. `old` has the
    token's error and its sensitivity, the derivative of x_{t-1} by the input, channel by channel.
    """
    _, pull = jax.vjp(lambda y: observe(y, loop, size), read(old["ssm"], C))
    (slope,) = pull(2 * e.reshape(len(e), -1))
    slope = (slope * read(old["sensitivity"], C)).reshape(e.shape)
    assert loop.authority is not None
    return -loop.authority[:, None, None] * old["error"][..., None] * slope[..., None, :]


def run(
    tokens: Tokens, loop: Loop, state: State, key: jax.Array | None = None, chunk: int | None = None
) -> tuple[jax.Array, State]:
    """The loop over a sequence.

    Args:
        state: as `init_state` of the mixer, without conv: ssm [B, E, N] and so on.
        key: of the process noise; None: no noise.
        chunk: only the states between chunks of this many tokens are saved for the backward pass; None: CHUNK.

    Returns:
        h(x_t C_t) [B, T, E], and the state after the last token.
    """
    batch, length = tokens.u.shape[:2]
    loop = contracted(loop)
    heads = 1 if loop.base is None else len(loop.base)
    size = tokens.u.shape[2] // heads if loop.h is None else len(loop.h.outward_bias)
    turn = lambda s: {n: jnp.swapaxes(x, 1, 2) if n in ("ssm", "sensitivity") else x for n, x in s.items()}  # noqa: E731
    split = min(chunk or conba_state.CHUNK, length)
    if tokens.mask is None and length % split:  # the last chunk has tokens that do not exist
        tokens = dataclasses.replace(tokens, mask=jnp.ones((batch, length), bool))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(state, piece):
        tokens, index = piece
        if key is not None:
            shape = (*tokens.u.shape[:2], loop.A.shape[1], loop.A.shape[0])
            noise = jax.random.normal(jax.random.fold_in(key, index), shape, loop.A.dtype)
            tokens = dataclasses.replace(tokens, write=loop.noise * noise)
        return jax.lax.scan(functools.partial(advance, loop, size), state, tokens)

    pieces = split_time(tokens, split, time_first=True)
    state, y = jax.lax.scan(body, turn(state), (pieces, jnp.arange(-(-length // split))))
    return join_time(y, length, time_first=True), turn(state)
