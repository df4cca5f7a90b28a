"""Conba and its sequential variant, token by token and document by document, as docs/mixcon.md writes them.

One document of one row at a time: x [T, D] without padding. Gains are K itself, and states [E, N]. In float64 if the
parameters are.
"""

import jax
import jax.numpy as jnp
import numpy as np

silu = jax.nn.silu


def rms(x, scale, eps):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def inputs(p, x, eps):
    """u, dt [T, E], b, c [T, N], z [T, E]."""
    a, z = x @ p["in_proj"][:, 0], x @ p["in_proj"][:, 1]
    taps = len(p["conv_weight"])
    padded = jnp.concatenate([jnp.zeros((taps - 1, a.shape[1]), a.dtype), a])
    u = silu(sum(p["conv_weight"][i] * padded[i : i + len(x)] for i in range(taps)) + p["conv_bias"])
    rank = p["dt_proj"].shape[0]
    delta, b, c = jnp.split(u @ p["x_proj"], [rank, rank + p["A_log"].shape[1]], axis=-1)
    delta, b, c = (rms(v, p[f"{name}_norm"], eps) for v, name in zip((delta, b, c), ("delta", "B", "C"), strict=True))
    return u, jax.nn.softplus(delta @ p["dt_proj"] + p["dt_bias"]), b, c, z


def gate(p, x, scaling):
    """R of x [E, N]."""
    if scaling == "off":
        return x
    factor = silu(x @ p["Z"].T + p["g"])
    return factor if scaling == "literal" else factor * x


def rates(p, u):
    """beta and lambda of each head for the inputs u [T, E]."""

    def number(name):
        weight, bias = p.get(f"{name}_weight"), p[f"{name}_bias"]
        return bias + (0 if weight is None else u @ weight) + jnp.zeros((len(u), len(bias)), u.dtype)

    beta = 1 / (1 + jnp.exp(-number("step")))
    return beta, jnp.exp(-jnp.logaddexp(number("leak"), 0)) if "leak_bias" in p else None


def gained(p, y, u, rule):
    """gamma K_t e_t [T, E] for the readouts y [T, E], with the gain adapting from token to token."""
    beta, memory = rates(p, u)
    base = p["base"]
    heads, size, _ = base.shape
    errors = (y - p["reference"] * u).reshape(len(y), heads, size)

    def step(learned, token):
        e, beta, memory = token
        K = base + learned
        correction = p["authority"][:, None] * jnp.einsum("hpq,hq->hp", K, e)
        if rule == "published":
            new = learned - beta[:, None, None] * jnp.einsum("hp,hq->hpq", e, e)
        else:
            k = e / jnp.sqrt(jnp.sum(e * e, axis=-1, keepdims=True) + 1e-6)
            push = jnp.einsum("hpq,hq,hr->hpr", jnp.eye(size, dtype=K.dtype) - K, k, k)
            new = memory[:, None, None] * learned + beta[:, None, None] * push
        return new, correction

    memory = jnp.ones_like(beta) if memory is None else memory
    _, corrections = jax.lax.scan(step, jnp.zeros_like(base), (errors, beta, memory))
    return corrections.reshape(y.shape)


def readouts(p, u, dt, b, c, options):
    """y_t = x_t c_t and x_{t-1} c_t, [T, E], of the scaled states x."""
    A, delay = -jnp.exp(p["A_log"]), options["delay"]
    folded = options["state_eval"] == "folded"

    def step(carry, token):
        past, x = carry  # past: the states s_t, s_{t-1}, ..., s_{t-tau}
        u, dt, b, c = token
        s = jnp.exp(dt[:, None] * A) * past[0] + (dt * u)[:, None] * b[None, :]
        past = jnp.concatenate([s[None], past])[: delay + 1]
        d = s + past[delay] @ p["F"].T + p["f"]
        new = (
            d * silu(p["Z"] @ b + p["g"]) if folded and options["scaling"] == "gate" else gate(p, d, options["scaling"])
        )
        return (past, new), (new @ c, x @ c)

    zero = jnp.zeros_like(A)
    return jax.lax.scan(step, (jnp.stack([zero] * (delay + 1)), zero), (u, dt, b, c))[1]


def conba(p, x, options):
    """The mixer's output [T, D] for one document."""
    u, dt, b, c, z = inputs(p, x, options["norm_eps"])
    y, before = readouts(p, u, dt, b, c, options)
    if options["control"] == "input":
        for _ in range(options["sweeps"]):
            driven = u - gained(p["controller"], before, u, options["rule"])
            y, before = readouts(p, driven, dt, b, c, options)
    y = y + p["D"] * u
    if options["control"] == "output":
        y = y - gained(p["controller"], y, u, options["rule"])
    return (y * silu(z)) @ p["out_proj"]


def mlp(p, name, x):
    """W2 swish(W1 x + b1) + b2 over the last axis."""
    return silu(x @ p[f"{name}_in"].T + p[f"{name}_in_bias"]) @ p[f"{name}_out"].T + p[f"{name}_out_bias"]


def conba_seq(p, x, options):
    """The sequential mixer's output [T, D] for one document: the closed loop itself."""
    u, dt, b, c, z = inputs(p, x, options["norm_eps"])
    A, control, rule = -jnp.exp(p["A_log"]), p.get("controller"), options["rule"]
    heads, size = (1, len(A)) if control is None else control["base"].shape[:2]
    Z = limited(p, options) if options["stability"] == "spectral" else p.get("Z")

    def plant(v):  # one channel's [N]
        d = {"identity": lambda: v, "linear": lambda: v @ p["F"].T + p["f"], "mlp": lambda: mlp(p, "fd", v)}
        return gate({"Z": Z, "g": p.get("g")}, d[options["fd"]](), options["scaling"])

    def h(y):
        return y if options["h"] == "linear" else mlp(p, "h", y.reshape(heads, size)).reshape(y.shape)

    def correct(learned, e):
        return (control["authority"][:, None] * jnp.einsum("hpq,hq->hp", control["base"] + learned, e)).reshape(-1)

    def advance(x, learned, e, token):
        """The state after a token with the error e [H, P]."""
        u, dt, b = token[:3]
        driven = u - correct(learned, e) if control else u
        return jax.vmap(plant)(jnp.exp(dt[:, None] * A) * x + (dt * driven)[:, None] * b)

    def adapt(learned, e, beta, memory):
        if rule == "published":
            return learned - beta[:, None, None] * jnp.einsum("hp,hq->hpq", e, e)
        k = e / jnp.sqrt(jnp.sum(e * e, axis=-1, keepdims=True) + 1e-6)
        push = k - jnp.einsum("hpq,hq->hp", control["base"] + learned, k)
        return memory[:, None, None] * learned + beta[:, None, None] * jnp.einsum("hp,hq->hpq", push, k)

    def step(carry, token):
        state, learned, before = carry
        (u, _, _, c), beta, memory = token
        e = None
        if control:
            error = lambda state: (h(state @ c) - control["reference"] * u).reshape(heads, size)  # noqa: E731
            e = error(state)
            if rule == "mit":  # the gradient itself, through the step before; zero where there was none, as e is then
                squared = lambda K: jnp.sum(error(advance(before[0], K, *before[1:])) ** 2)  # noqa: E731
                learned = learned - beta[:, None, None] * jax.grad(squared)(learned)
            before = state, e, token[0]
        state = advance(state, learned, e, token[0])
        if control and rule != "mit":
            learned = adapt(learned, e, beta, memory)
        return (state, learned, before), h(state @ c)

    tokens, zero = (u, dt, b, c), jnp.zeros_like(A)
    learned, beta, memory, before = None, None, None, None
    if control:
        learned, (beta, memory) = jnp.zeros_like(control["base"]), rates(control, u)
        before = zero, jnp.zeros((heads, size), x.dtype), jax.tree.map(lambda v: jnp.zeros_like(v[0]), tokens)
    y = jax.lax.scan(step, (zero, learned, before), (tokens, beta, memory))[1]
    return ((y + p["D"] * u) * silu(z)) @ p["out_proj"]


def limited(p, options):
    """Z with |Z| Lip(f_d) 1.0999 at most 0.999."""
    norm = lambda matrix: jnp.linalg.norm(matrix, 2)  # noqa: E731
    inner = {
        "identity": lambda: 1.0,
        "linear": lambda: norm(p["F"]),
        "mlp": lambda: norm(p["fd_in"]) * norm(p["fd_out"]) * 1.0999,
    }[options["fd"]]()
    constant = norm(p["Z"]) * inner * 1.0999
    return p["Z"] * jnp.where(constant > 0.999, 0.999 / constant, 1.0)


def by_document(mixer, p, x, segments, mask, options):
    """`mixer` for x [B, T, D] with padding, which gives zeros, and documents [B, T] of equally many real tokens."""
    places = [
        np.stack(np.broadcast_arrays(row, np.flatnonzero((segments[row] == document) & mask[row])))
        for row in range(len(x))
        for document in np.unique(segments[row])
    ]
    rows, times = np.stack(places, axis=1)
    y = jax.vmap(lambda x: mixer(p, x, options))(x[rows, times])
    return jnp.zeros_like(x).at[rows, times].set(y)
