"""A recurrence that is not linear in its state, such as LSTM's: one token after the other, at the cost of one product.

All that does not depend on the state is computed for all tokens before the loop. In the loop is a single matrix
product, that of h_{t-1}. The backward pass saves only the states: it computes the products of all tokens at once, then
walks back with one product a token, and takes the gradient of the weight in one product over all tokens at the end.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqmodels.kernels.arrays import expand_to
from seqmodels.kernels.segments import forget
from seqmodels.kernels.tuning import UNROLLED

State = dict[str, jax.Array]  # [B, E] float32 each; "h" is the output, and what the product reads
Cell = Callable[[State, Any, jax.Array], State]  # (state, the token's arrays, product [B, G, E]) -> new state


def recur(
    cell: Cell,
    tokens: Any,
    weight: jax.Array,
    bias: jax.Array,
    state: State,
    reset: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, State]:
    """s_t = cell(s_{t-1}, tokens_t, h_{t-1} weight + bias) over a sequence.

    Args:
        cell: a function of arrays alone, the same object in every call.
        tokens: pytree of arrays [B, T, ...] of what the cell reads beside the product.
        weight: [E, G, E], in the dtype of the products; bias: [G, E].
        state: before the first token, float32.
        reset: [B, T] bool, True where a document starts: the state is zero before that token. None: nowhere.
        mask: [B, T] bool, False on padding, which leaves the state as it is. None: every token is real.

    Returns:
        h [B, T, E] in the dtype of the state, and the state after the last token.
    """
    time_first = functools.partial(jax.tree.map, lambda x: jnp.moveaxis(x, 1, 0))
    states, state = _scan(cell, time_first(tokens), weight, bias, state, time_first((reset, mask)))
    return jnp.moveaxis(states["h"], 0, 1), state


def multiply(h: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """h weight + bias, [..., G, E] with the sums in the dtype of h, of h [..., E]."""
    product = jnp.einsum("...e,egf->...gf", h.astype(weight.dtype), weight, preferred_element_type=h.dtype)
    return product + bias


def advance(cell: Cell, state: State, token: Any, product: jax.Array, reset: Any, mask: Any) -> State:
    """One token: the new state, given the product of h, which is zero where `reset` [B] is True."""
    new = cell({name: forget(x, reset) for name, x in state.items()}, token, product)
    if mask is None:
        return new
    return {name: jnp.where(expand_to(mask, x.ndim), x, state[name]) for name, x in new.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(cell, tokens, weight, bias, state, documents):
    """`recur` with time first: every state [T, B, E], and the last."""

    def step(state, inputs):
        token, (reset, mask) = inputs
        new = advance(cell, state, token, multiply(forget(state["h"], reset), weight, bias), reset, mask)
        return new, new

    state, states = jax.lax.scan(step, state, (tokens, documents), unroll=unroll(tokens))
    return states, state


def unroll(tokens: Any) -> int:
    """Tokens that one step of the loop computes: all of a few, as in decoding, then there is no loop."""
    length = len(jax.tree.leaves(tokens)[0])
    return length if length <= UNROLLED else 1


def _forward(cell, tokens, weight, bias, state, documents):
    states, last = _scan(cell, tokens, weight, bias, state, documents)
    return (states, last), (tokens, weight, bias, state, states, documents)


def _backward(cell, kept, gradients):
    tokens, weight, bias, state, states, documents = kept
    dstates, dlast = gradients
    before = jax.tree.map(lambda first, all: jnp.concatenate([first[None], all[:-1]]), state, states)
    h = forget(before["h"], documents[0])
    products = multiply(h, weight, bias)

    def step(dstate, inputs):
        dnew, token, product, before, (reset, mask) = inputs
        _, pull = jax.vjp(lambda *args: advance(cell, *args, reset, mask), before, token, product)
        dstate, dtoken, dproduct = pull(jax.tree.map(jnp.add, dstate, dnew))
        dh = jnp.einsum("bgf,egf->be", dproduct.astype(weight.dtype), weight, preferred_element_type=dproduct.dtype)
        return dstate | dict(h=dstate["h"] + forget(dh, reset)), (dtoken, dproduct)

    inputs = (dstates, tokens, products, before, documents)
    dstate, (dtokens, dproducts) = jax.lax.scan(step, dlast, inputs, reverse=True, unroll=unroll(tokens))
    narrow = dproducts.astype(weight.dtype)
    dweight = jnp.einsum("tbe,tbgf->egf", h.astype(weight.dtype), narrow, preferred_element_type=jnp.float32)
    dbias = jnp.sum(dproducts, axis=(0, 1))
    return dtokens, dweight.astype(weight.dtype), dbias.astype(bias.dtype), dstate, None


_scan.defvjp(_forward, _backward)
