"""Routing of tokens to experts: which experts a token goes to, the router's losses, and the order of rows by expert.

Pure functions. M tokens, X experts, K of them a token; a token that goes nowhere, such as padding, has the expert X.
Everything about the router is float32: rounded logits would choose other experts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmodels.parallel import mean_over_rows


class Route(NamedTuple):
    """Where tokens go.

    Attributes:
        experts: [..., K] int32, from 0 to X - 1; X: nowhere.
        weights: [..., K] float32, of the experts' outputs.
    """

    experts: jax.Array
    weights: jax.Array


def router_logits(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., D] of any dtype times weight [D, X] float32: [..., X] float32, in full precision on every device."""
    wide = x.astype(jnp.float32)
    return jnp.einsum("...d,dx->...x", wide, weight, precision=jax.lax.Precision.HIGHEST)


def softmax_route(logits: jax.Array, top_k: int, renormalise: bool = False) -> Route:
    """The K largest softmax probabilities of logits [..., X].

    Args:
        renormalise: divide the weights by their sum, as Mixtral (arXiv 2401.04088) does. Jamba (2403.19887) does not.
    """
    probabilities = jax.nn.softmax(logits)
    _, experts = jax.lax.top_k(jax.lax.stop_gradient(probabilities), top_k)
    weights = chosen(probabilities, experts)
    return Route(experts, weights / weights.sum(-1, keepdims=True) if renormalise else weights)


def sigmoid_route(logits: jax.Array, bias: jax.Array, top_k: int) -> Route:
    """DeepSeek-V3 (arXiv 2412.19437, eq. 13 to 16): sigmoids of logits [..., X], divided by the sum of the chosen ones.

    Args:
        bias: [X], added for the choice of experts only. It has no gradient here; see `with_load_gradient`.
    """
    scores = jax.nn.sigmoid(logits)
    _, experts = jax.lax.top_k(jax.lax.stop_gradient(scores + bias), top_k)
    weights = chosen(scores, experts)
    return Route(experts, weights / (weights.sum(-1, keepdims=True) + 1e-20))


def chosen(values: jax.Array, experts: jax.Array) -> jax.Array:
    """values [..., X] at experts [..., K]: [..., K]. It selects instead of gathering, whose gradient would scatter."""
    here = experts[..., None] == jnp.arange(values.shape[-1])
    return jnp.sum(jnp.where(here, values[..., None, :], 0), axis=-1)


def send_nowhere(route: Route, kept: jax.Array, experts: int) -> Route:
    """The route without what is not kept: there the expert is `experts`, X, and the weight 0.

    Args:
        kept: bool, broadcast to [..., K].
    """
    return Route(jnp.where(kept, route.experts, experts), jnp.where(kept, route.weights, 0))


@jax.custom_vjp
def with_load_gradient(weights: jax.Array, bias: jax.Array, excess: jax.Array) -> jax.Array:
    """The weights as they are. In the backward pass the bias [X] gets `excess` as its gradient.

    The load of an expert is no differentiable function of its bias. Its excess over the mean load, [X], tells the
    optimizer the direction in which the bias must go. As a gradient it is summed over micro-batches and devices.
    """
    return weights


with_load_gradient.defvjp(
    lambda weights, bias, excess: (weights, excess),
    lambda excess, gradient: (gradient, excess, jnp.zeros_like(excess)),
)


# Statistics and losses. A mask [...], without the axis of experts, is True for tokens that count; None: all do.


def load(experts: jax.Array, count: int) -> jax.Array:
    """[X] int32: how many of experts [..., K] are each of the `count` experts."""
    here = experts[..., None] == jnp.arange(count)
    return jnp.sum(here, axis=tuple(range(experts.ndim)), dtype=jnp.int32)


def tokens(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """float32: the number of tokens of values [..., X] that count, at least 1 as it divides; see `mean_over_rows`."""
    if mask is None:
        return jnp.float32(math.prod(values.shape[:-1]))
    return jnp.maximum(mean_over_rows(jnp.sum(mask, dtype=jnp.float32)), 1)


def token_sum(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """[X]: values [..., X] added up over the tokens that count."""
    kept = values if mask is None else jnp.where(mask[..., None], values, 0)
    return jnp.sum(kept, axis=tuple(range(values.ndim - 1)))


def token_mean(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """[X]: the mean of values [..., X] over the tokens that count; 0 if none does."""
    return token_sum(values, mask) / tokens(values, mask)


def load_balance_loss(fractions: jax.Array, probabilities: jax.Array) -> jax.Array:
    """X sum_e f_e P_e of one layer (Fedus et al. 2022, arXiv 2101.03961, eq. 4, for K experts a token).

    It is K where the load or the probabilities are equal. Its gradient is that of the probabilities.

    Args:
        fractions: f [X], the load of each expert divided by the number of tokens; the sum is K.
        probabilities: P [X], mean over the tokens of the router's probability of each expert.
    """
    return fractions.size * jnp.sum(jax.lax.stop_gradient(fractions) * probabilities)


def pooled_load_balance_loss(logits: Sequence[jax.Array], top_k: int, mask: jax.Array | None = None) -> jax.Array:
    """The load balance loss of the means over all layers: `load_balancing_loss_func` of transformers.

    Opposite imbalances of two layers cancel in it. It is there for comparison; models train on the sum over layers.

    Args:
        logits: [..., X] of each layer.
    """
    probabilities = [jax.nn.softmax(layer.astype(jnp.float32)) for layer in logits]
    experts = [jax.lax.top_k(layer, top_k)[1] for layer in probabilities]
    count = probabilities[0].shape[-1]
    if mask is not None:
        experts = [jnp.where(mask[..., None], layer, count) for layer in experts]
    rows = tokens(logits[0], mask)
    loads = sum((load(layer, count) for layer in experts), jnp.zeros(count))
    means = sum((token_mean(layer, mask) for layer in probabilities), jnp.zeros(count))
    return load_balance_loss(loads / (len(logits) * rows), means / len(logits))


def z_loss(logits: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Mean over the tokens of logsumexp(logits)^2 (Zoph et al. 2022, arXiv 2202.08906, eq. 5)."""
    return token_mean(jnp.square(jax.nn.logsumexp(logits, axis=-1, keepdims=True)), mask)[0]


def entropy(probabilities: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Mean over the tokens of the entropy of probabilities [..., X], in nats."""
    return token_mean(-jax.scipy.special.xlogy(probabilities, probabilities).sum(-1, keepdims=True), mask)[0]


def collapsed(experts: jax.Array, load: jax.Array, tokens: jax.Array) -> jax.Array:
    """float32, 1 if the router sends all tokens to the same experts, or to one of them before all others; else 0.

    With fewer tokens than experts it says nothing, and is 0.

    Args:
        experts: [..., K], X for tokens that do not count.
        load: [X], of these.
        tokens: the number of tokens that count.
    """
    first = experts[..., 0]
    same = jnp.all((first == jnp.min(first)) | (first == load.size))
    few = jnp.sum(load > 0) <= experts.shape[-1]
    return jnp.asarray((same | few) & (tokens >= load.size), jnp.float32)


# Capacity


def expert_capacity(tokens: int, experts: int, top_k: int, factor: float) -> int:
    """Tokens of a group that an expert takes: its equal share times the factor, rounded up, and at least one."""
    return max(1, math.ceil(top_k * tokens / experts * factor))


def within_capacity(experts: jax.Array, count: int, capacity: int) -> jax.Array:
    """Whether each of experts [G, T, K] is among the first `capacity` of that expert in its group: bool [G, T, K].

    The order is that of the tokens, and for one token that of its experts. So no later token displaces an earlier one.
    """
    flat = experts.reshape(experts.shape[0], -1)
    # all of it sorts and selects: over rows on several devices a scatter would be gathered first
    rank = jnp.argsort(jnp.argsort(flat, axis=1, stable=True), axis=1)
    sizes = jnp.sum(flat[..., None] == jnp.arange(count), axis=1)
    position = rank - chosen(jnp.cumsum(sizes, axis=1) - sizes, flat)
    return (position < capacity).reshape(experts.shape)


# The order of rows by expert


class Order(NamedTuple):
    """The stable order of M K picks by expert.

    Attributes:
        order: [M K] int32, the pick of each sorted row; pick m K + j is the expert j of token m.
        inverse: [M K] int32, the sorted row of each pick.
        sizes: [X] int32, rows of each expert. The rows behind them go nowhere.
    """

    order: jax.Array
    inverse: jax.Array
    sizes: jax.Array


def sort_by_expert(experts: jax.Array, count: int) -> Order:
    """The order of experts [...], of which there are `count`, as one list."""
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    return Order(order, invert(order), load(flat, count))


def invert(order: jax.Array) -> jax.Array:
    """The inverse of a permutation [N] int32."""
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)


@jax.custom_vjp
def permute(rows: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """rows [N, D] in the order [N]. The gradient is a gather by the inverse; XLA would make a scatter of it."""
    return rows[order]


permute.defvjp(
    lambda rows, order, inverse: (rows[order], inverse),
    lambda inverse, gradient: (gradient[inverse], None, None),
)


@jax.custom_vjp
def dispatch(x: jax.Array, order: Order) -> jax.Array:
    """Tokens x [M, D] to rows [M K, D] sorted by expert. The gradient is gathered, and added in float32."""
    return x[order.order // (order.order.size // x.shape[0])]


def _dispatch_backward(saved, gradient):
    order, tokens = saved
    parts = gradient[order.inverse].reshape(tokens, -1, gradient.shape[-1])
    return parts.astype(jnp.float32).sum(1).astype(gradient.dtype), None


dispatch.defvjp(lambda x, order: (dispatch(x, order), (order, x.shape[0])), _dispatch_backward)


@jax.custom_vjp
def combine(rows: jax.Array, weights: jax.Array, order: Order) -> jax.Array:
    """Rows [M K, D] sorted by expert to tokens [M, D]: the sum over a token's rows times weights [M, K], in float32.

    Returns float32. Rows that go nowhere must be zero. Whatever the gradients of tokens hold that go nowhere, it
    does not reach the rows.
    """
    parts = rows[order.inverse].reshape(*weights.shape, -1)
    return jnp.sum(parts.astype(jnp.float32) * weights[..., None], axis=1)


def _combine_backward(saved, gradient):
    rows, weights, order = saved
    sent = order.sizes.sum()
    parts = rows[order.inverse].reshape(*weights.shape, -1).astype(jnp.float32)
    d_weights = jnp.sum(parts * gradient[:, None], axis=-1)
    d_weights = jnp.where(order.inverse.reshape(weights.shape) < sent, d_weights, 0)
    weight = weights.reshape(-1)[order.order]
    d_rows = gradient[order.order // weights.shape[1]] * weight[:, None]
    d_rows = jnp.where(jnp.arange(weight.size)[:, None] < sent, d_rows, 0)
    return d_rows.astype(rows.dtype), d_weights, None


combine.defvjp(lambda rows, weights, order: (combine(rows, weights, order), (rows, weights, order)), _combine_backward)
