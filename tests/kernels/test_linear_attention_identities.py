"""What other recurrences are linear attention: each formula, as its source writes it, against the one operation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels import linear_attention as op
from seqmodels.kernels.linear_attention import linear_attention
from seqmodels.kernels.selective_scan import selective_scan
from tests.kernels.helpers import assert_close, serving

B, T, H, K, V = 2, 11, 3, 4, 5
FACTS = dict(shape=(B, T, H, H, K, V), dtype=np.dtype("float32"), decay="channel", read="exclusive", bonus=True)
BACKENDS = [name for name in serving(op, **FACTS, chunk=None) if name != "reference"]


def same(ours, theirs, arrays):
    """Values and gradients of both functions of the arrays agree."""

    def both(f):
        out, pull = jax.vjp(lambda arrays: f(**arrays), arrays)
        draw = np.random.default_rng(5)
        return out, pull(jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype), out))

    both = jax.jit(both, static_argnums=0)
    assert_close(both(ours), both(theirs), 1e-5)


def normal(**shapes):
    draw = np.random.default_rng(1)
    return {name: np.asarray(draw.normal(size=shape), np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("implementation", BACKENDS)
def test_ssd_is_a_selective_scan_with_one_rate_a_head(implementation):
    """Mamba-2 (arXiv 2405.21060): A is a number, so the scan's states [E, N] are matrices [N, P] of the heads."""
    arrays = normal(x=(B, T, H, V), dt=(B, T, H), A=(H,), C=(B, T, K), key=(B, T, K), state=(B, H, K, V))

    def scan(x, dt, A, C, key, state):
        def channels(x):
            return jnp.repeat(x, V, axis=-1)

        wide = jnp.swapaxes(state, 2, 3).reshape(B, H * V, K)
        rates = jnp.broadcast_to(channels(-jnp.exp(A))[:, None], (H * V, K))
        y, wide = selective_scan(
            x.reshape(B, T, -1), channels(dt), rates, key, C, initial_state=wide, implementation="reference"
        )
        return y.reshape(B, T, H, V), jnp.swapaxes(wide.reshape(B, H, V, K), 2, 3)

    def attention(x, dt, A, C, key, state):
        dt = jax.nn.softplus(dt)
        q, k, v = C[:, :, None], key[:, :, None], dt[..., None] * x
        return linear_attention(q, k, v, -dt * jnp.exp(A), initial_state=state, implementation=implementation)

    same(attention, scan, arrays)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_retention(implementation):
    """RetNet's parallel form (arXiv 2307.08621, equation 5): (Q K^T * D) V with D_nm = gamma^(n - m)."""
    arrays = normal(q=(B, T, H, K), k=(B, T, H, K), v=(B, T, H, V))
    gamma = 1 - 2.0 ** (-5 - np.arange(H))

    def parallel(q, k, v):
        steps = np.arange(T)[:, None] - np.arange(T)
        D = np.where(steps >= 0, gamma[:, None, None] ** np.maximum(steps, 0), 0)
        return jnp.einsum("bhnm,bmhv->bnhv", jnp.einsum("bnhk,bmhk->bhnm", q, k) * K**-0.5 * D, v)

    def attention(q, k, v):
        decay = jnp.asarray(np.log(gamma), jnp.float32)
        return linear_attention(q, k, v, decay, scale=K**-0.5, implementation=implementation)[0]

    same(attention, parallel, arrays)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_elu_features_with_their_normaliser(implementation):
    """Katharopoulos et al. 2020, equations 9 to 12: phi(q) S / (phi(q) z), phi = elu + 1."""
    arrays = normal(q=(B, T, H, K), k=(B, T, H, K), v=(B, T, H, V))
    phi = lambda x: jax.nn.elu(x) + 1  # noqa: E731

    def sums(q, k, v):
        S = jnp.cumsum(phi(k)[..., None] * v[..., None, :], axis=1)
        z = jnp.cumsum(phi(k), axis=1)
        return jnp.einsum("bthk,bthkv->bthv", phi(q), S) / jnp.einsum("bthk,bthk->bth", phi(q), z)[..., None]

    def attention(q, k, v):
        return linear_attention(phi(q), phi(k), v, normalise=True, implementation=implementation)[0]

    same(attention, sums, arrays)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_mamba3_by_keys_rescaled(implementation):
    """Mamba-3's trapezoidal rule (arXiv 2603.15569) writes each token twice: at its own step, and at the next one's.

    S_t = a_t S_{t-1} + (1 - l_t) dt_t a_t k_{t-1} x_{t-1}^T + l_t dt_t k_t x_t^T. Both are one write of the key times
    dt_t l_t + dt_{t+1} (1 - l_{t+1}), of which a token itself does not read the second part.
    """
    arrays = normal(q=(B, T, 1, K), k=(B, T, 1, K), x=(B, T, H, V), dt=(B, T, H), trap=(B, T, H), A=(B, T, H))

    def prepare(dt, trap, A):
        dt = jax.nn.softplus(dt)
        return dt, jax.nn.sigmoid(trap), -dt * jnp.exp(A)

    def steps(q, k, x, dt, trap, A):
        dt, trap, logs = prepare(dt, trap, A)
        S, before, out = jnp.zeros((B, H, K, V)), jnp.zeros((B, H, K, V)), []
        for t in range(T):
            write, a = k[:, t, :, :, None] * x[:, t, :, None], jnp.exp(logs[:, t])
            late, own = (1 - trap[:, t]) * dt[:, t] * a, trap[:, t] * dt[:, t]
            S = a[..., None, None] * S + late[..., None, None] * before + own[..., None, None] * write
            out.append(jnp.einsum("bk,bhkv->bhv", q[:, t, 0], S))
            before = write
        return jnp.stack(out, axis=1)

    def attention(q, k, x, dt, trap, A):
        dt, trap, logs = prepare(dt, trap, A)
        late = jnp.pad((dt * (1 - trap))[:, 1:], [(0, 0), (0, 1), (0, 0)])
        y, _ = linear_attention(q, k, (dt * trap + late)[..., None] * x, logs, implementation=implementation)
        return y - (late * jnp.sum(q * k, axis=-1))[..., None] * x

    same(attention, steps, arrays)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_rwkv6_is_an_inclusive_read_corrected(implementation):
    """RWKV-6 reads before it decays and writes, with a bonus for its own key; GLA after. Dividing by the decay undoes
    the first, taking the token's own part away the second.
    """
    arrays = normal(q=(B, T, H, K), k=(B, T, H, K), v=(B, T, H, V), w=(B, T, H, K), u=(H, K))
    logs = lambda w: -jnp.exp(0.3 * w - 1)  # noqa: E731

    def exclusive(q, k, v, w, u):
        return linear_attention(q, k, v, logs(w), read="exclusive", bonus=u, implementation=implementation)

    def inclusive(q, k, v, w, u):
        undone = q * jnp.exp(-logs(w))
        y, state = linear_attention(undone, k, v, logs(w), implementation=implementation)
        return y + jnp.sum((q * u - undone) * k, axis=-1, keepdims=True) * v, state

    same(exclusive, inclusive, arrays)
