"""DenseSSM on S4, S4D and H3: cross kernels against a naive model that stores every state of all layers, in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.configs import h3, s4, s4d
from seqmodels.errors import UserError
from seqmodels.interop.stacking import stack
from seqmodels.model import build

B, T, D, N, VOCABULARY = 2, 7, 4, 4, 11
CONFIGS = dict(s4=s4, s4d=s4d, h3=h3)
IDS = np.array([[0, 0, 0, 1, 1, 1, 1], [4, 4, 4, 4, 4, 7, 7]], np.int32)
MASK = np.array([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 0]], bool)


def make(name, layers=3, scan_blocks=0, **dense):
    """A small model with these fields of config.model.dense, and its perturbed parameters."""
    config = CONFIGS[name].get_config().model.copy_and_resolve_references()
    with config.unlocked():
        config.update(dict(width=D, repeats=layers, pattern=name, scan_blocks=scan_blocks))
        config[name].state = N
        config.dense.update({"variant": "read", "depth": 2, "bottleneck": 2, **dense})
    built = build(config, VOCABULARY)
    draw = np.random.default_rng(1)

    def perturbed(path, x):
        start = {"log_dt": -1.0, "scale": 1.0, "L_imag": 2.0, "A_imag": 2.0}.get(path[-1].key, 0.0)
        return jnp.asarray(start + 0.5 * draw.normal(size=x.shape), jnp.float32)

    shapes = nn.unbox(jax.eval_shape(built.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    return built, jax.tree.map_with_path(perturbed, shapes)


TOKENS = np.random.default_rng(5).integers(0, VOCABULARY, (B, T)).astype(np.int32)


# The naive model: dense matrices, states of both numbers of each conjugate pair, [B, T, E, N]


def both(v):
    """[E, N] of [N / 2, E]."""
    return jnp.concatenate([v, v.conj()]).T


def complex_of(p):
    return both(p[0] + 1j * p[1])


def s4_step(p):
    """A [E, N, N] and B [E, N] of the bilinear rule, by solving."""
    low, dt = complex_of(p["P"]), jnp.exp(p["log_dt"])[:, None, None]
    a = jax.vmap(jnp.diag)(both(-jnp.exp(p["L_log"]) + 1j * p["L_imag"])) - low[:, :, None] * low.conj()[:, None]
    ahead, behind = jnp.eye(N) + dt / 2 * a, jnp.eye(N) - dt / 2 * a
    return jnp.linalg.solve(behind, ahead), jnp.linalg.solve(behind, dt * complex_of(p["B"])[..., None])[..., 0]


def s4d_step(p):
    """The same for an input that is held."""
    a, dt = both(-jnp.exp(p["A_log"]) + 1j * p["A_imag"]), jnp.exp(p["log_dt"])[:, None]
    return jax.vmap(jnp.diag)(jnp.exp(dt * a)), (jnp.exp(dt * a) - 1) / a * complex_of(p["B"])


def run(step, x, resets, mask):
    """Every state of x [B, T, E]: [B, T, E, N]."""
    a, b = step

    def advance(h, token):
        x, reset, real = token
        h = jnp.where(reset[:, None, None], 0, h)
        h = jnp.where(real[:, None, None], jnp.einsum("enm,bem->ben", a, h) + b * x[..., None], h)
        return h, h

    tokens = [jnp.moveaxis(v, 1, 0) for v in (x, resets, mask)]
    return jnp.moveaxis(jax.lax.scan(advance, jnp.zeros((B, D, N), complex), tuple(tokens))[1], 0, 1)


def shifted(p, k, resets, mask):
    """H3's filter over the last four real tokens of the document."""
    rows = []
    for row in range(B):
        past, ys = [], []
        for t in range(T):
            past = [] if resets[row, t] else past
            past = [*past, k[row, t]] if mask[row, t] else past
            ys.append(sum((p["shift_taps"][3 - i] * v for i, v in enumerate(past[::-1][:4])), jnp.zeros(D)))
        rows.append(jnp.stack(ys))
    return jnp.stack(rows)


def naive(name, params, layers=3, variant="read", gate="channel", per_source=False, projection="identity", norm=False):
    """Final hidden states by the equations of seqmodels/depth/lti.py."""
    params, mask = params["params"], MASK
    last = [[int(IDS[row, [i for i in range(t) if MASK[row, i]] or [t]][-1]) for t in range(T)] for row in range(B)]
    resets = (np.array(last) != IDS) & MASK
    rms = lambda v, scale: scale * v / jnp.sqrt(jnp.mean(v**2, -1, keepdims=True) + 1e-5)  # noqa: E731
    r, below = params["embedding"][TOKENS], []
    for layer in range(layers):
        p, dense = params[f"block_{layer}"]["mixer"], params[f"block_{layer}"].get("dense", {})
        x = jnp.where(mask[..., None], rms(r, params[f"block_{layer}"]["norm"]["scale"]), 0)
        u = x
        if name == "h3":
            q, k, v = (x @ p[f"{way}_proj"] for way in ("query", "key", "value"))
            u = jnp.where(mask[..., None], shifted(p, k, resets, mask) * v, 0)
        states, c = run((s4_step if name == "s4" else s4d_step)(p), u, resets, mask), p["C"][0] + 1j * p["C"][1]
        read = lambda c, states: jnp.einsum("en,bten->bte", both(c), states).real  # noqa: E731
        own, sources = read(c, states), below[:2]
        y = own + p["D"] * u
        for i, (lower, theirs) in enumerate(sources):
            g = 1.0
            if gate == "channel":
                inner = jax.nn.silu(x @ dense["gate_channel_in"])
                g = jax.nn.silu(inner @ dense["gate_channel_out"][:, i if per_source else 0])
            query = dense["projection"].T @ c if projection == "linear" else c
            term = read(query, lower) if variant == "read" else theirs
            y = y + g * (rms(term, dense["norm_channel"]["scale"]) if norm else term)
        if name == "h3":
            r = r + (q * y) @ p["out_proj"]
        else:
            z = jnp.einsum("bte,ecd->btcd", jax.nn.gelu(y, approximate=False), p["out_proj"])
            r = r + z[:, :, 0] * jax.nn.sigmoid(z[:, :, 1])
        below = [(states, own), *below]
    return jnp.where(mask[..., None], rms(r, params["final_norm"]["scale"]), 0)


CASES = [
    ("s4d", dict(per_source=True, projection="linear")),
    pytest.param("s4", dict(layers=2, norm=True), marks=pytest.mark.slow),
    pytest.param("h3", dict(layers=2, variant="output", gate="none"), marks=pytest.mark.slow),
]


@functools.cache
def compiled(model):
    """Hidden states of tokens from a state or none, zero on padding, and the new state."""

    def call(params, tokens, ids, mask, state):
        y, state = model.apply(params, tokens, ids, mask, state)
        return jnp.where(mask[..., None], y, 0), state

    return jax.jit(call)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_equals_stored_states(name, case):
    """Packed and padded rows: outputs, gradients of all parameters, and token by token the same."""
    model, params = make(name, **case)
    weights = np.random.default_rng(9).normal(size=(B, T, D))

    def values(hidden, dtype):
        def loss(params):
            y = hidden(params)
            return jnp.sum(y * weights.astype(dtype)), y

        gradients, y = jax.jit(jax.grad(loss, has_aux=True))(jax.tree.map(lambda x: x.astype(dtype), params))
        return y, gradients

    got = values(lambda p: compiled(model)(p, TOKENS, IDS, MASK, None)[0], jnp.float32)
    with jax.enable_x64(True):
        want = values(lambda p: naive(name, p, **case), jnp.float64)
    for (path, x), reference in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        scale = max(np.linalg.norm(reference), 1e-6)
        assert np.linalg.norm(x - np.asarray(reference)) < 5e-5 * scale, jax.tree_util.keystr(path)

    state, ys = model.init_state(B), []
    for t in range(T):
        y, state = compiled(model)(params, *(v[:, t : t + 1] for v in (TOKENS, IDS, MASK)), state)
        ys.append(y)
    np.testing.assert_allclose(jnp.concatenate(ys, 1), want[0], atol=3e-5)


@pytest.mark.slow
def test_fresh_links_do_nothing_and_a_scan_over_blocks_no_harm():
    """The last gate matrix starts at zero. Systems and inputs are in the carry of the scan."""
    unrolled, plain = make("s4d")[0], make("s4d", variant="none")[0]
    scan, params = make("s4d", scan_blocks=1)[0], nn.unbox(jax.jit(unrolled.init)(jax.random.key(0), TOKENS))["params"]
    blocks = {key: {k: v for k, v in block.items() if k != "dense"} for key, block in params.items() if "block" in key}
    assert "dense" in params["block_1"] and "dense" not in params["block_0"]
    run = lambda model, params: jax.jit(model.apply)({"params": params}, TOKENS, IDS)[0]  # noqa: E731
    np.testing.assert_array_equal(run(unrolled, params), run(plain, params | blocks))

    params = make("s4d")[1]["params"]
    whole = run(unrolled, params)
    np.testing.assert_allclose(run(scan, stack(params, size=1, unrolled=2)), whole, atol=2e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(variant="rank"), "variant='rank': must be one of 'read', 'output' with s4 in model.pattern"),
        (dict(gate="state"), "gate='state': must be one of 'channel', 'none' with s4 in model.pattern"),
    ],
)
def test_what_has_no_cross_kernel_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        make("s4", **fields)
