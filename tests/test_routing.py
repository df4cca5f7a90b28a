"""The functions of routing, each against its definition in NumPy or in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from seqmodels.layers import routing

M, D, X, K = 12, 5, 6, 2


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_router_logits_are_float32_from_bfloat16():
    """A product of bfloat16 numbers that is rounded to bfloat16 would choose other experts."""
    x, w = jnp.asarray(draw(M, 64), jnp.bfloat16), draw(64, X, seed=1)
    ours = routing.router_logits(x, w)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, np.asarray(x, np.float64) @ w.astype(np.float64), rtol=1e-5, atol=1e-5)


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_weights_of_softmax_are_probabilities_or_their_shares():
    logits = draw(M, X)
    order = np.argsort(-logits, axis=-1)[:, :K]
    values = np.take_along_axis(softmax(logits), order, -1)
    raw, shares = routing.softmax_route(logits, K), routing.softmax_route(logits, K, renormalise=True)
    np.testing.assert_array_equal(raw.experts, order)
    np.testing.assert_allclose(raw.weights, values, rtol=1e-5)
    np.testing.assert_allclose(shares.weights, values / values.sum(-1, keepdims=True), rtol=1e-5)
    assert raw.weights.sum(-1).max() < 0.99  # the two differ


def test_the_bias_chooses_but_is_not_in_the_weights():
    logits, bias = draw(M, X), np.zeros(X, np.float32)
    bias[3] = 10
    scores = 1 / (1 + np.exp(-logits))
    route = routing.sigmoid_route(logits, bias, K)
    assert np.all(route.experts[:, 0] == 3)
    values = np.take_along_axis(scores, np.asarray(route.experts), -1)
    np.testing.assert_allclose(route.weights, values / values.sum(-1, keepdims=True), rtol=1e-5)


def test_weights_have_the_gradient_of_a_gather():
    logits, weights = draw(M, X), draw(M, K, seed=1)

    def gathered(logits):
        p = jax.nn.softmax(logits)
        return jnp.sum(weights * jnp.take_along_axis(p, jax.lax.top_k(p, K)[1], -1))

    ours = jax.grad(lambda v: jnp.sum(weights * routing.softmax_route(v, K).weights))(logits)
    np.testing.assert_allclose(ours, jax.grad(gathered)(logits), atol=1e-6)


def test_the_bias_gets_the_excess_load_as_its_gradient():
    """Whatever the gradient of the weights; the weights' own gradient passes."""
    weights, bias, excess = draw(M, K), np.zeros(X, np.float32), np.arange(X, dtype=np.float32) - 2
    f = lambda w, b: 7 * routing.with_load_gradient(w, b, excess).sum()  # noqa: E731
    d_weights, d_bias = jax.grad(f, argnums=(0, 1))(weights, bias)
    np.testing.assert_array_equal(d_bias, excess)
    np.testing.assert_array_equal(d_weights, np.full((M, K), 7))


# Losses and statistics


def test_the_balance_loss_is_k_for_equal_loads_or_equal_probabilities():
    equal = jnp.full(X, 1 / X)
    assert routing.load_balance_loss(K * equal, jnp.asarray(softmax(draw(X)))) == pytest.approx(K)
    assert routing.load_balance_loss(jnp.asarray([K, *[0] * (X - 1)]), equal) == pytest.approx(K)
    skewed = jnp.asarray([1.0, 1.0, 0, 0, 0, 0])
    assert routing.load_balance_loss(skewed, skewed / 2) == pytest.approx(X)  # everything to two experts


def test_the_fractions_have_no_gradient():
    gradient = jax.grad(routing.load_balance_loss, argnums=(0, 1))(jnp.ones(X), jnp.full(X, 0.5))
    np.testing.assert_array_equal(gradient[0], np.zeros(X))
    np.testing.assert_array_equal(gradient[1], np.full(X, X))


MASK = np.arange(M) % 3 > 0


@pytest.mark.parametrize("mask", [None, MASK])
def test_means_over_the_tokens_that_count(mask):
    """NaN in the others reaches nothing."""
    logits = draw(M, X)
    rows = logits if mask is None else logits[mask]
    poisoned = logits if mask is None else np.where(mask[:, None], logits, np.nan)
    p = softmax(rows)
    wide = np.log(np.exp(rows).sum(-1))
    assert routing.z_loss(poisoned, mask) == pytest.approx((wide**2).mean(), rel=1e-5)
    assert routing.entropy(jax.nn.softmax(poisoned), mask) == pytest.approx((-p * np.log(p)).sum(-1).mean(), rel=1e-5)
    np.testing.assert_allclose(routing.token_mean(jax.nn.softmax(poisoned), mask), p.mean(0), rtol=1e-5)
    assert routing.tokens(logits, mask) == len(rows)
    gradient = jax.grad(lambda v: routing.z_loss(v, mask) + routing.entropy(jax.nn.softmax(v), mask))(poisoned)
    assert np.isfinite(gradient[slice(None) if mask is None else mask]).all()


def test_entropy_of_certainty_is_zero():
    assert routing.entropy(jnp.eye(X), None) == 0


def test_load_counts_picks_that_go_somewhere():
    experts = np.array([[0, 2], [2, X], [X, X], [2, 5]])
    np.testing.assert_array_equal(routing.load(experts, X), [1, 0, 3, 0, 0, 1])


def test_collapsed_is_when_all_tokens_agree():
    def of(experts):
        experts = np.asarray(experts)
        tokens = (experts[:, 0] < X).sum().astype(np.float32)
        return float(routing.collapsed(experts, routing.load(experts, X), tokens))

    spread = np.stack([np.arange(M) % X, (np.arange(M) + 1) % X], axis=-1)
    assert of(spread) == 0
    assert of(np.where([True, False], 4, (np.arange(M)[:, None] % 3))) == 1  # the first expert is 4 for all
    assert of(np.where(np.arange(M)[:, None] % 2, [0, 1], [1, 0])) == 1  # nobody else is ever chosen
    assert of([[4, 1], [4, 0], [4, 2]]) == 0  # too few tokens to say
    assert of(np.where(MASK[:, None], [4, 1], X)) == 1  # padding does not count


# Capacity


def test_capacity_by_counting():
    """In the order of tokens, and for a token in that of its experts; every row for itself."""
    experts = np.asarray(np.random.default_rng(0).integers(0, X + 1, (3, M, K)), np.int32)
    for capacity in (1, 2, 100):
        kept = np.asarray(routing.within_capacity(experts, X, capacity))
        for row in range(3):
            taken = np.zeros(X + 1, int)
            for token in range(M):
                for j in range(K):
                    expert = experts[row, token, j]
                    assert expert == X or kept[row, token, j] == (taken[expert] < capacity)
                    taken[expert] += 1
    assert routing.expert_capacity(12, 8, 2, 1.25) == 4 and routing.expert_capacity(1, 8, 2, 1.0) == 1


# The order of rows


def routes(seed=0, nowhere=True):
    rng = np.random.default_rng(seed)
    experts = np.stack([rng.permutation(X)[:K] for _ in range(M)])
    if nowhere:
        experts[3], experts[7, 1] = X, X
    return jnp.asarray(experts, jnp.int32)


def test_the_order_is_stable_and_by_expert():
    experts = routes()
    order = routing.sort_by_expert(experts, X)
    flat = np.asarray(experts).ravel()
    np.testing.assert_array_equal(order.order, np.argsort(flat, kind="stable"))
    np.testing.assert_array_equal(np.asarray(order.inverse)[order.order], np.arange(M * K))
    np.testing.assert_array_equal(order.sizes, [(flat == e).sum() for e in range(X)])


def test_gradients_of_the_permutations_are_those_of_a_gather():
    experts, x, weights = routes(nowhere=False), draw(M, D), draw(M, K, seed=1)
    order, target = routing.sort_by_expert(experts, X), draw(M * K, D, seed=2)

    def loss(dispatch, permute, combine):
        def f(x, weights):
            rows = dispatch(x)
            back = permute(jnp.sin(rows) * target)
            return jnp.sum(jnp.cos(combine(back, weights)))

        return jax.grad(f, argnums=(0, 1))(x, weights)

    ours = loss(
        lambda x: routing.dispatch(x, order),
        lambda rows: routing.permute(routing.permute(rows, order.order, order.inverse), order.inverse, order.order),
        lambda rows, weights: routing.combine(rows, weights, order),
    )
    plain = loss(
        lambda x: x[order.order // K],
        lambda rows: rows,
        lambda rows, weights: jnp.sum(rows[order.inverse].reshape(M, K, D) * weights[..., None], 1),
    )
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    check_grads(lambda x, w: routing.combine(routing.dispatch(x, order), w, order), (x, weights), 1, ["rev"], rtol=1e-2)


def test_no_scatter_in_the_backward_pass_of_the_permutations():
    """Only the inverse of the order is scattered: integers, once."""
    experts = routes()

    def loss(x, weights):
        order = routing.sort_by_expert(experts, X)
        return routing.combine(routing.dispatch(x, order), weights, order).sum()

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(draw(M, D), draw(M, K)))
    assert text.count("scatter[") == 1 and "scatter-add" not in text


def test_what_goes_nowhere_reaches_nothing():
    """Neither its rows, nor its weights, nor the gradient of its output."""
    experts = routes()
    nowhere = np.asarray(experts) == X
    order = routing.sort_by_expert(experts, X)
    x, weights = draw(M, D), np.where(nowhere, 0, draw(M, K, seed=1))
    sent = jnp.arange(M * K)[:, None] < order.sizes.sum()

    def f(x, weights):
        return routing.combine(jnp.where(sent, routing.dispatch(x, order), 0), weights, order)

    y, pull = jax.vjp(f, x, weights)
    bad = np.where((np.arange(M) == 3)[:, None], np.nan, x)
    y_bad, pull_bad = jax.vjp(f, bad, weights)
    np.testing.assert_array_equal(y, y_bad)
    assert not y[3].any() and y[7].any()
    up = draw(M, D, seed=4)
    up_bad = np.where((np.arange(M) == 3)[:, None], np.nan, up)
    want, got = pull(up), pull_bad(up_bad)
    others = np.arange(M) != 3
    np.testing.assert_array_equal(want[0][others], got[0][others])
    np.testing.assert_array_equal(np.where(nowhere, 0, want[1]), np.where(nowhere, 0, got[1]))
