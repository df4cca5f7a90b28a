"""The recurrence of RWKV-4 (Peng et al. 2023, arXiv 2305.13048, eq. 14, appendix D): an average, its weights decay.

num_t = e^-w num_{t-1} + e^k_t v_t,  den_t = e^-w den_{t-1} + e^k_t
y_t = (num_{t-1} + e^(u + k_t) v_t) / (den_{t-1} + e^(u + k_t))

Both sums are kept divided by e^max, where max is the largest exponent so far, so that nothing overflows. Two stretches
of tokens are joined by `join`, which is associative: a chunk is computed in parallel, chunks one after the other.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from seqmodels.kernels.arrays import expand_to, join_time, split_time

CHUNK = 64  # tokens computed in parallel
EMPTY = -1e38  # exponent of a sum without tokens: finite, as inf - inf is not a number

State = dict[str, jax.Array]  # num, den, max, each [B, E] float32


@struct.dataclass
class Sums:
    """The sums over a stretch of tokens.

    Attributes:
        age: [..., 1] number of its real tokens, by which the sums before it decay.
        num, den, max: [..., E]; the sums are num e^max and den e^max.
        fresh: [..., 1] bool, whether a document starts in it, so that the sums before it do not count. None: no.
    """

    age: jax.Array
    num: jax.Array
    den: jax.Array
    max: jax.Array
    fresh: jax.Array | None


def empty(state: State) -> State:
    """Sums over no tokens, in the shape of `state`."""
    return {name: jnp.full_like(x, EMPTY if name == "max" else 0) for name, x in state.items()}


def select(empty_where: jax.Array | None, state: State) -> State:
    """`state` [..., E], replaced by sums over no tokens where `empty_where` [..., 1] is True. None: nowhere."""
    if empty_where is None:
        return state
    return {name: jnp.where(empty_where, none, state[name]) for name, none in empty(state).items()}


def join(log_decay: jax.Array, a: Sums, b: Sums) -> Sums:
    """The sums over the stretch a and then b; log_decay [E] is -w, that of one token."""
    old = select(b.fresh, dict(num=a.num, den=a.den, max=a.max))
    shifted = old["max"] + b.age * log_decay
    top = jnp.maximum(shifted, b.max)
    of_a, of_b = jnp.exp(shifted - top), jnp.exp(b.max - top)
    return Sums(
        age=a.age + b.age,
        num=of_a * old["num"] + of_b * b.num,
        den=of_a * old["den"] + of_b * b.den,
        max=top,
        fresh=None if a.fresh is None or b.fresh is None else a.fresh | b.fresh,
    )


def wkv(
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    bonus: jax.Array,
    state: State,
    reset: jax.Array | None = None,
    mask: jax.Array | None = None,
    chunk: int = CHUNK,
) -> tuple[jax.Array, State]:
    """The recurrence over a sequence.

    Args:
        k, v: [B, T, E], finite on padding.
        log_decay: [E] float32, -w, not positive; bonus: [E] float32, u.
        state: before the first token, as `empty` or returned by a call before.
        reset: [B, T] bool, True where a document starts. None: nowhere.
        mask: [B, T] bool, False on padding, which leaves the state as it is and whose output is 0. None: all are real.
        chunk: tokens computed in parallel. Only the states between chunks are saved for the backward pass.

    Returns:
        y [B, T, E] float32, and the state after the last token.
    """
    batch, length = k.shape[:2]
    k, v, size = k.astype(jnp.float32), v.astype(jnp.float32), min(chunk, length)
    if mask is None and length % size:  # the last chunk has tokens that do not exist
        mask = jnp.ones((batch, length), bool)
    wider = lambda x: None if x is None else expand_to(x, 3)  # noqa: E731

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(state, piece):
        return _chunk(*piece, log_decay, bonus, state)

    state, y = jax.lax.scan(step, state, split_time((k, v, wider(reset), wider(mask)), size))
    return join_time(y, length), state


def _chunk(k, v, reset, mask, log_decay, bonus, state):
    """One chunk: the state after it, and y. k and v are [B, C, E]; reset and mask [B, C, 1] or None."""
    padding = None if mask is None else ~mask
    token = select(padding, dict(num=v, den=jnp.ones_like(k), max=k))
    age = jnp.ones_like(k[..., :1]) if mask is None else mask.astype(k.dtype)
    inside = jax.lax.associative_scan(functools.partial(join, log_decay), Sums(age, fresh=reset, **token), axis=1)
    incoming = {name: x[:, None] for name, x in state.items()}
    after = join(log_decay, Sums(jnp.zeros_like(age[:, :1]), fresh=None, **incoming), inside)
    sums = dict(num=after.num, den=after.den, max=after.max)
    before = {name: jnp.concatenate([incoming[name], x[:, :-1]], axis=1) for name, x in sums.items()}
    before = select(reset, before)
    top = jnp.maximum(before["max"], k + bonus)
    past, now = jnp.exp(before["max"] - top), jnp.exp(k + bonus - top)
    y = (past * before["num"] + now * v) / (past * before["den"] + now)
    return {name: x[:, -1] for name, x in sums.items()}, y if mask is None else jnp.where(mask, y, 0)
