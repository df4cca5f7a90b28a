"""The recurrence of RWKV-4 (Peng et al. 2023, arXiv 2305.13048, eq. 14, appendix D): an average, its weights decay.

num_t = e^-w num_{t-1} + e^k_t v_t,  den_t = e^-w den_{t-1} + e^k_t
y_t = (num_{t-1} + e^(u + k_t) v_t) / (den_{t-1} + e^(u + k_t))

Both sums are kept divided by e^max, where max is the largest exponent so far, so that nothing overflows. Two stretches
of tokens are joined by `join`, which is associative. So the tokens are split into chunks, which are computed side by
side, token after token, and then joined one after the other: C + T / C small steps in place of T.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from seqmodels.kernels.arrays import expand_to, join_time, split_time
from seqmodels.kernels.tuning import UNROLLED

CHUNK = 32  # C, tokens of a chunk: about the root of usual lengths
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
        chunk: C.

    Returns:
        y [B, T, E] float32, and the state after the last token.
    """
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    reset, mask = (None if x is None else expand_to(x, 3) for x in (reset, mask))
    sums = _every_sum(k, v, log_decay, state, reset, mask, min(chunk, k.shape[1]))
    before = {name: jnp.concatenate([state[name][:, None], x[:, :-1]], axis=1) for name, x in sums.items()}
    before = select(reset, before)
    top = jnp.maximum(before["max"], k + bonus)
    past, now = jnp.exp(before["max"] - top), jnp.exp(k + bonus - top)
    y = (past * before["num"] + now * v) / (past * before["den"] + now)
    return y if mask is None else jnp.where(mask, y, 0), {name: x[:, -1] for name, x in sums.items()}


def _every_sum(k, v, log_decay, state, reset, mask, size):
    """The sums num, den and max [B, T, E] after every token; reset and mask are [B, T, 1] or None."""
    length = k.shape[1]
    if mask is None and length % size:  # the last chunk has tokens that do not exist
        mask = jnp.ones_like(k[..., :1], bool)
    # [C, chunks, B, ...]: the chunks are side by side
    arrays = split_time((k, v, reset, mask), size, time_first=True)
    k, v, reset, mask = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), arrays)
    token = select(None if mask is None else ~mask, dict(num=v, den=jnp.ones_like(k), max=k))
    age = jnp.ones_like(k[..., :1]) if mask is None else mask.astype(k.dtype)
    tokens = Sums(age, fresh=reset, **token)
    after = jax.checkpoint(functools.partial(join, log_decay), prevent_cse=False)  # saves what it joins, nothing else

    def within(sums, token):
        return (new := after(sums, token)), new

    def across(sums, chunk):
        return after(sums, chunk), sums

    first = jax.tree.map(lambda x: jnp.zeros_like(x[0]), tokens)
    first = first.replace(max=jnp.full_like(first.max, EMPTY))
    whole, inside = jax.lax.scan(within, first, tokens, unroll=size if size <= UNROLLED else 1)
    incoming = Sums(jnp.zeros_like(whole.age[0]), fresh=None, **state)
    _, before = jax.lax.scan(across, incoming, whole)
    sums = after(before, inside)
    turn = lambda x: join_time(jnp.swapaxes(x, 0, 1), length, time_first=True)  # noqa: E731
    return dict(num=turn(sums.num), den=turn(sums.den), max=turn(sums.max))
