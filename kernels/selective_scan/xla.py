"""The selective scan in plain XLA, by chunks of time. States are kept only at chunk boundaries, others are recomputed.

Inside a chunk, the recurrence is a sequential scan on CPU, where that is 10 times faster than an associative scan.
On other platforms it is an associative scan, because each of 2048 small steps would be a kernel launch. States have the
layout [B, G, N, E] in both, so that the innermost axis is long.

Calls with a few tokens, as in decoding, are unrolled token by token, on states in their given layout: for one token, a
GPU then reads and writes the state once, in place if it is donated.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.kernels import dispatch
from seqmodels.kernels.arrays import computed_once, expand_to, join_time, pad, round_up, split_time
from seqmodels.kernels.segments import forget, resets
from seqmodels.kernels.selective_scan.kept import add_states, at, put, token
from seqmodels.kernels.tuning import UNROLLED

# tokens; the states of one chunk are held while it is differentiated, on a CPU also its decays, in its nearest cache
CHUNK = {"cpu": 16, "default": 64}
NEAR = 3 * 2**13  # most numbers of the states that a CPU scans at once: a few such arrays fit into a core's caches
PIECES = 4  # most pieces, because each is compiled by itself


def supports(**facts: object) -> str | None:
    """Supports every call on every platform."""
    return None


def selective_scan(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    z: jax.Array | None,
    dt_bias: jax.Array | None,
    weights: jax.Array | None,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    mask: jax.Array | None,
    dt_softplus: bool,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.selective_scan.selective_scan`, with the group axis present and padding set to zero."""
    dtype = jnp.promote_types(jnp.float32, u.dtype)
    dt = dt.astype(dtype) + (0 if dt_bias is None else dt_bias.astype(dtype))
    dt = jax.nn.softplus(dt) if dt_softplus else dt
    if dispatch.platforms() == ("cpu",):
        dt = checkpoint_name(dt, "scan")  # a CPU computes the logarithms again in more time than it reads dt
    if mask is not None:
        dt = jnp.where(mask[:, :, None, None], dt, 0)
    if weights is not None:
        batch, length, groups, width = u.shape
        weights = jnp.broadcast_to(weights, (batch, length, groups - 1, width))
        weights = jnp.concatenate([jnp.ones((batch, length, 1, width), weights.dtype), weights], axis=2)
    reset = resets(segment_ids, initial_segment, mask)
    A, state = A.astype(dtype), initial_state.astype(dtype)
    if u.shape[1] <= UNROLLED:
        y, state = _few_tokens(u, dt, A, B, C, weights, reset, state)
    else:
        A, state = jnp.swapaxes(A, -1, -2), jnp.swapaxes(state, -1, -2)
        count = _pieces(state)
        pieces = zip(*(_channels(x, count) for x in (u, dt, A, weights, state)), strict=True)
        done = [_scan(u, dt, A, B, C, weights, reset, state) for u, dt, A, weights, state in pieces]
        y, state = (jnp.concatenate(x, axis=-1) for x in zip(*done, strict=True))
        state = jnp.swapaxes(state, -1, -2)
    if D is not None:
        y = y + D.astype(dtype) * u[:, :, 0]
    if z is not None:
        y = y * jax.nn.silu(z.astype(dtype))
    return y.astype(u.dtype), state


def _pieces(state):
    """How many pieces of channels are scanned one after the other. On a CPU the states of a piece stay near."""
    pieces = 1
    while dispatch.platforms() == ("cpu",) and state.size > pieces * NEAR and pieces < PIECES:
        pieces *= 2
    return pieces if state.shape[-1] % pieces == 0 else 1


def _channels(x, pieces):
    """x [..., E] in equal pieces; None stays None."""
    return [None] * pieces if x is None else jnp.split(x, pieces, axis=-1)


def _few_tokens(u, dt, A, B, C, weights, reset, state):
    """y [B, T, E] and the final state [B, G, E, N]; A is [G, E, N], the rest as for `_scan`."""
    readouts = []
    for t in range(u.shape[1]):
        old = forget(state, None if reset is None else reset[:, t])
        state = jnp.exp(dt[:, t, :, :, None] * A) * old + (dt[:, t] * u[:, t])[..., None] * B[:, t, :, None]
        readouts.append(jnp.sum(state * C[:, t, :, None], axis=-1))
    # Makes XLA compute all sums and the new state in one kernel. Otherwise the kernel of y would compute some of the
    # sums, and read the states again.
    readouts, state = jax.lax.optimization_barrier((readouts, state))
    y = jnp.stack(readouts, axis=1)
    return jnp.sum(y if weights is None else weights * y, axis=2), state


@jax.custom_vjp
def _scan(u, dt, A, B, C, weights, reset, state):
    """y [B, T, E] and the final state [B, G, N, E]; A is [G, N, E], reset [B, T] bool or None, the rest as above."""
    y, state, _ = _forward(u, dt, A, B, C, weights, reset, state)
    return y, state


def _scan_fwd(*inputs):
    y, state, boundaries = (checkpoint_name(x, "scan") for x in _forward(*inputs))
    return (y, state), (inputs, boundaries)


def _scan_bwd(residuals, cotangents):
    inputs, boundaries = residuals
    du, ddt, dA, dB, dC, dweights, dstate = _backward(*inputs, boundaries, *cotangents)
    gradients = (du, ddt, dA, dB, dC, dweights, None, dstate)
    return tuple(None if g is None else g.astype(x.dtype) for x, g in zip(inputs, gradients, strict=True))


_scan.defvjp(_scan_fwd, _scan_bwd)


def _forward(u, dt, A, B, C, weights, reset, state):
    """y, the final state, and the states [T / chunk, B, G, N, E] at the start of each chunk."""
    return _by_platform(_sequential_forward, _associative_forward, u, dt, A, B, C, weights, reset, state)


def _backward(u, dt, A, B, C, weights, reset, state, boundaries, dy, dstate):
    """Gradients of the inputs. Each chunk recomputes its states from the state at its start."""
    arrays = (u, dt, A, B, C, weights, reset, boundaries, dy, dstate)
    return _by_platform(_sequential_backward, _associative_backward, *arrays)


def _chunk() -> int:
    """Tokens of a chunk."""
    return CHUNK.get(jax.default_backend(), CHUNK["default"])


def _by_platform(sequential, associative, *arguments):
    """Sequential on CPU, associative elsewhere; chosen at lowering."""
    return jax.lax.platform_dependent(*arguments, cpu=sequential, default=associative)


def _decay(dt, A):
    """exp(dt A) [..., B, (G,) N, E]."""
    return jnp.exp(dt[..., None, :] * A)


def _write(u, dt, B):
    """(dt u) B [..., B, G, N, E]."""
    return (dt * u)[..., None, :] * B[..., None]


def _read(state, C, weights, sum_states):
    """sum_g w_g (s_g C_g), [..., B, E]."""
    readout = sum_states(state * C[..., None])
    if weights is None:
        return readout[..., 0, :] if readout.shape[-2] == 1 else jnp.sum(readout, axis=-2)
    return jnp.sum(weights * readout, axis=-2)


def _reduce_states(x):
    """Sum over N of [..., N, E]."""
    return jnp.sum(x, axis=-2)


def _sequential_forward(u, dt, A, B, C, weights, reset, state):
    """As `_forward`, token by token. Tokens are read and written where they are, [B, T, ..]: nothing is turned."""
    length, size = u.shape[1], min(_chunk(), u.shape[1])
    u, dt, B, C, weights, reset = _padded((u, dt, B, C, weights, reset), size)

    def step(t, carry):
        state, y = carry
        u_t, dt_t, B_t, C_t, weights_t, reset_t = token((u, dt, B, C, weights, reset), t)
        state = _decay(dt_t, A) * forget(state, reset_t) + _write(u_t, dt_t, B_t)
        return state, put(y, _read(state, C_t, weights_t, add_states), t, axis=1)

    def chunk(carry, n):
        return jax.lax.fori_loop(0, size, lambda i, carry: step(n * size + i, carry), carry), carry[0]

    y = jnp.zeros((*u.shape[:2], u.shape[3]), state.dtype)
    (state, y), boundaries = jax.lax.scan(chunk, (state, y), jnp.arange(u.shape[1] // size))
    return y[:, :length], state, boundaries


def _sequential_backward(u, dt, A, B, C, weights, reset, boundaries, dy, dstate):
    """As `_backward`: recompute the states of a chunk forwards, then run the adjoint recurrence backwards.

    A chunk's decays and decayed states go into memory that all chunks share, so it is filled with zeros only once.
    """
    length, size = u.shape[1], min(_chunk(), u.shape[1])
    u, dt, B, C, weights, reset, dy = _padded((u, dt, B, C, weights, reset, dy), size)

    def forward(t, i, carry):
        state, decays, kept = carry
        u_t, dt_t, B_t, reset_t = token((u, dt, B, reset), t)
        # The next line reads each array where the one before wrote it, and not from a copy
        decays = put(decays, _decay(dt_t, A), i)
        kept = put(kept, at(decays, i) * forget(state, reset_t), i)
        return at(kept, i) + _write(u_t, dt_t, B_t), decays, kept

    def backward(t, i, decays, kept, carry):
        dstate, dA, gradients = carry
        u_t, dt_t, B_t, C_t, weights_t, reset_t, dy_t = token((u, dt, B, C, weights, reset, dy), t)
        dreadout = dy_t[:, None] if weights is None else weights_t * dy_t[:, None]
        dreadout = jnp.broadcast_to(dreadout, u_t.shape)
        dstate = computed_once(dstate + dreadout[..., None, :] * C_t[..., None], in_loop=True)
        inputs = u_t, dt_t, B_t, C_t, weights_t
        new, dA_t = _token_gradients(inputs, A, at(kept, i), dreadout, dy_t, dstate, add_states)
        gradients = jax.tree.map(lambda all, one: put(all, one, t, axis=1), gradients, new)
        return forget(at(decays, i) * dstate, reset_t), dA + dA_t, gradients

    def chunk(carry, piece):
        n, state = piece
        decays, kept, *rest = carry
        _, decays, kept = jax.lax.fori_loop(0, size, lambda i, x: forward(n * size + i, i, x), (state, decays, kept))

        def adjoin(i, carry):
            i = size - 1 - i
            return backward(n * size + i, i, decays, kept, carry)

        return (decays, kept, *jax.lax.fori_loop(0, size, adjoin, tuple(rest))), None

    room = jnp.zeros((2, size, *dstate.shape), dstate.dtype)
    gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, dstate.dtype), (u, dt, B, C, weights))
    carry = (*room, dstate, jnp.zeros_like(dstate), gradients)
    pieces = jnp.arange(len(boundaries)), boundaries
    (*_, dstate, dA, gradients), _ = jax.lax.scan(chunk, carry, pieces, reverse=True)
    du, ddt, dB, dC, dweights = jax.tree.map(lambda x: x[:, :length], gradients)
    return du, ddt, jnp.sum(dA, axis=0), dB, dC, dweights, dstate


def _padded(arrays, size):
    """The arrays [B, T, ..] with zeros at their end, up to a multiple of `size` tokens."""
    return jax.tree.map(lambda x: pad(x, {1: round_up(x.shape[1], size)}), arrays)


def _token_gradients(token, A, kept, dreadout, dy, dstate, sum_states):
    """Gradients of u, dt, B, C, weights, and of A by token, at one token or at many ([..., B, G, N, E]).

    Args:
        kept: exp(dt A) s_{t-1}, the decayed old state.
        dreadout: gradient of each group's readout, [..., B, G, E].
        dstate: gradient of the state after the token, through this token's readout and all later tokens.
        sum_states: function that sums over N.
    """
    u, dt, B, C, weights = token
    new = kept + _write(u, dt, B)
    # a product in TF32 or bfloat16, the default on accelerators, would have errors in the third digit
    dC = jnp.einsum("...ne,...e->...n", new, dreadout, precision="highest")
    dB = jnp.einsum("...ne,...e->...n", dstate, dt * u, precision="highest")
    dwrite = sum_states(dstate * B[..., None])
    dexponent = dstate * kept
    ddt = sum_states(dexponent * A) + dwrite * u
    dA = dexponent * dt[..., None, :]
    dweights = None if weights is None else dy[..., None, :] * sum_states(new * C[..., None])
    return (dwrite * dt, ddt, dB, dC, dweights), dA


def linear_recurrence(
    decay: jax.Array, write: jax.Array, state: jax.Array, reset: jax.Array | None = None, reverse: bool = False
) -> jax.Array:
    """s_t = decay_t s_{t-1} + write_t by an associative scan over the leading axis; [T, ...] each, state [...].

    With `reverse`, s_t = decay_t s_{t+1} + write_t. Where `reset` [T, B] is True, s_t = write_t. Products do not cross
    a reset, neither here nor in the gradient, so that infinity and NaN of one document reach no other.
    """
    edge = -1 if reverse else 0
    write = write.at[edge].add(decay[edge] * forget(state, None if reset is None else reset[edge]))
    if reset is None:
        return jax.lax.associative_scan(_join, (decay, write), reverse=reverse)[1]
    fresh = expand_to(reset, write.ndim)
    return jax.lax.associative_scan(_join_documents, (decay, write, fresh), reverse=reverse)[1]


def _join(first, second):
    """The map s -> decay s + write of two neighbouring stretches of time, from the map of each."""
    return second[0] * first[0], second[0] * first[1] + second[1]


def _join_documents(first, second):
    """As `_join`. Each stretch also has a flag: whether a document begins in it, which drops the state before it.

    The decay of such a stretch is that of its tokens since then.
    """
    decay, write, fresh = second
    before, state = jnp.where(fresh, 1, first[0]), jnp.where(fresh, 0, first[1])
    return decay * before, decay * state + write, first[2] | fresh


def _associative_forward(u, dt, A, B, C, weights, reset, state):
    """As `_forward`, all tokens of a chunk at once."""
    split = functools.partial(split_time, size=min(_chunk(), u.shape[1]), time_first=True)

    def body(state, tokens):
        u, dt, B, C, weights, reset = tokens
        states = linear_recurrence(_decay(dt, A), _write(u, dt, B), state, reset)
        return states[-1], (_read(states, C, weights, _reduce_states), state)

    state, (y, boundaries) = jax.lax.scan(body, state, split((u, dt, B, C, weights, reset)))
    return join_time(y, u.shape[1], time_first=True), state, boundaries


def _associative_backward(u, dt, A, B, C, weights, reset, boundaries, dy, dstate):
    """As `_backward`, all tokens of a chunk at once."""
    split = functools.partial(split_time, size=min(_chunk(), u.shape[1]), time_first=True)

    def body(carry, piece):
        dstate, dA = carry
        dstate, dA_chunk, gradients = _associative_chunk(*piece, A, dstate)
        return (dstate, dA + dA_chunk), gradients

    chunks = (split((u, dt, B, C, weights, reset)), split(dy), boundaries)
    (dstate, dA), gradients = jax.lax.scan(body, (dstate, jnp.zeros_like(A)), chunks, reverse=True)
    du, ddt, dB, dC, dweights = (None if g is None else join_time(g, u.shape[1], time_first=True) for g in gradients)
    return du, ddt, dA, dB, dC, dweights, dstate


def _associative_chunk(tokens, dy, state, A, dstate):
    """The gradient of the state before a chunk, and of A and the tokens in it."""
    u, dt, B, C, weights, reset = tokens
    decay = _decay(dt, A)
    states = linear_recurrence(decay, _write(u, dt, B), state, reset)
    kept = decay * forget(jnp.concatenate([state[None], states[:-1]]), reset)
    dreadout = dy[:, :, None] if weights is None else weights * dy[:, :, None]
    dreadout = jnp.broadcast_to(dreadout, u.shape)
    later = jnp.concatenate([decay[1:], jnp.ones_like(decay[:1])])  # no decay after the last token
    ends = None if reset is None else jnp.concatenate([reset[1:], jnp.zeros_like(reset[:1])])
    later = forget(later, ends)  # it belongs to the next document
    dstates = linear_recurrence(later, dreadout[..., None, :] * C[..., None], dstate, ends, reverse=True)
    gradients, dA = _token_gradients(tokens[:5], A, kept, dreadout, dy, dstates, _reduce_states)
    dfirst = forget(decay[0] * dstates[0], None if reset is None else reset[0])
    return dfirst, jnp.sum(dA, axis=(0, 1)), gradients
