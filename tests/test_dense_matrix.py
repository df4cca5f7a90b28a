"""DenseSSM on RetNet and Mamba-2, against naive models that store every state of every layer, in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from seqmodels.configs import mamba2, retnet
from seqmodels.errors import UserError
from seqmodels.interop.stacking import stack
from seqmodels.model import build
from seqmodels.training.sharding import AXES, RULES, param_shardings, tokens_sharding, unbox

pytestmark = pytest.mark.slow

B, T, D, LAYERS, VOCABULARY = 2, 7, 8, 3, 11
HEADS, KEYS, VALUES, GROUPS = 4, 2, 4, 2  # of Mamba-2 with E = 16; RetNet has half the heads and twice their width
VARIANTS = ("read", "input", "output", "rank")


def make(name, **dense):
    """A small model with these fields of config.model.dense, and its perturbed parameters."""
    config = dict(mamba2=mamba2, retnet=retnet)[name].get_config().model.copy_and_resolve_references()
    with config.unlocked():
        config.update(dict(width=D, repeats=LAYERS, pattern=name))
        if name == "mamba2":
            config.mamba2.update(dict(state=KEYS, head_dim=VALUES, groups=GROUPS))
        else:
            config.retnet.update(dict(heads=2, row_scale=True, norm_eps=1.0))
        config.implementation.linear_attention = "reference"  # quick to compile; all others equal it
        config.dense.bottleneck_state, config.dense.gate_std = 0, 0.0
        config.dense.update({"variant": "read", "depth": 2, "bottleneck": 2, **dense})
    built = build(config, VOCABULARY)
    draw = np.random.default_rng(1)

    def perturbed(path, x):
        start = {"dt_bias": -1.0, "A_log": 0.5, "D": 1.0, "scale": 1.0}.get(path[-1].key, 0.0)
        return jnp.asarray(start + (0.4 if x.ndim > 1 else 0.2) * draw.normal(size=x.shape), jnp.float32)

    shapes = nn.unbox(jax.eval_shape(built.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    return built, jax.tree.map_with_path(perturbed, shapes)


def tokens():
    return jnp.asarray(np.random.default_rng(5).integers(0, VOCABULARY, (B, T)), jnp.int32)


def recur(decay, k, v):
    """S_t = decay_t S_{t-1} + k_t v_t^T, every state kept: [B, T, H, K, V]."""

    def step(state, token):
        decay, k, v = token
        state = decay[..., None, None] * state + k[..., None] * v[..., None, :]
        return state, state

    time_first = [jnp.moveaxis(x, 1, 0) for x in (decay, k, v)]
    start = jnp.zeros((*k.shape[:1], *k.shape[2:], v.shape[-1]))
    return jnp.moveaxis(jax.lax.scan(step, start, tuple(time_first))[1], 0, 1)


def rms(x, scale=1.0, eps=1e-5):
    return scale * x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + eps)


def turn(x):
    """Channels 2j and 2j + 1 are a complex number; rotated by position, theta from 1 to 1e-4 over the pairs."""
    theta = 10000.0 ** -np.linspace(0, 1, x.shape[-1] // 2)
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * np.arange(T)[:, None, None] * theta)
    return jnp.stack([z.real, z.imag], -1).reshape(x.shape)


def retnet_layer(p, x):
    """What is read and written: q, k [B, T, Hk K], v [B, T, H V]; from keys to those that are used; decay; the rest."""
    q, k, v, gate = (
        jnp.einsum("btd,dhk->bthk", x, p[f"{name}_proj"]).reshape(B, T, -1) for name in ("q", "k", "v", "gate")
    )
    gamma = 1 - 2.0 ** (-5 - jnp.arange(2))
    total = jnp.cumsum(gamma ** jnp.arange(T)[:, None], 0)  # sum of the decays that a token sees

    def finish(y):
        y = rms(y / jnp.sqrt(total)[..., None], eps=1.0).reshape(B, T, -1) * jax.nn.silu(gate)
        return y @ p["out_proj"].reshape(-1, D)

    spread = lambda k: turn(k.reshape(B, T, 2, -1))  # noqa: E731
    return q, k * (D // 2) ** -0.5, v, spread, jnp.broadcast_to(gamma, (B, T, 2)), 1.0, finish


def mamba2_layer(p, x):
    z, u = x @ p["in_proj"][:, 0], x @ p["in_proj"][:, 1]
    mixed = jnp.concatenate([u, x @ p["BC_proj"]], -1)
    weight = jnp.concatenate([p["conv_weight"], p["BC_conv_weight"]], 1)
    bias = jnp.concatenate([p["conv_bias"], p["BC_conv_bias"]])
    past = jnp.concatenate([jnp.zeros((B, 3, mixed.shape[-1])), mixed], 1)
    mixed = jax.nn.silu(bias + sum(weight[i] * past[:, i : i + T] for i in range(4)))
    u, k, q = jnp.split(mixed, [2 * D, 2 * D + GROUPS * KEYS], -1)
    dt = jax.nn.softplus(x @ p["dt_proj"] + p["dt_bias"])

    def finish(y):
        y = (y + p["D"][:, None] * u.reshape(B, T, HEADS, VALUES)).reshape(B, T, -1) * jax.nn.silu(z)
        y = rms(y.reshape(B, T, GROUPS, -1)).reshape(B, T, -1) * p["scale"]
        return y @ p["out_proj"]

    spread = lambda k: jnp.repeat(k.reshape(B, T, GROUPS, KEYS), HEADS // GROUPS, axis=2)  # noqa: E731
    return q, k, u, spread, jnp.exp(-jnp.exp(p["A_log"]) * dt), dt[..., None], finish


def naive(name, params, variant, depth=2, gate="channel", per_source=False, norm=False):
    """Final hidden states, by the equations of seqmodels/dense_matrix.py, with all states kept."""
    params = params["params"]
    r = params["embedding"][tokens()]
    below = []  # of each layer below, the nearest first: k, v, written v, states, own readout
    for layer in range(LAYERS):
        block = params[f"block_{layer}"]
        dense, x = block.get("dense", {}), rms(r, block["norm"]["scale"])
        layer_of = dict(mamba2=mamba2_layer, retnet=retnet_layer)[name]
        q, k, v, spread, decay, step, finish = layer_of(block["mixer"], x)
        heads = lambda v: v.reshape(B, T, decay.shape[2], -1)  # noqa: B023, E731
        sources = below[:depth]

        def gates(name, count):
            if f"gate_{name}_out" not in dense:  # noqa: B023
                return [1.0] * count
            inner = jax.nn.silu(x @ dense[f"gate_{name}_in"])  # noqa: B023
            each = [jax.nn.silu(inner @ dense[f"gate_{name}_out"][:, i if per_source else 0]) for i in range(count)]  # noqa: B023
            return each

        g_V, g_K = gates("channel", len(sources)), gates("state", len(sources))
        if "gain_state" in dense:
            g_K = [1 + x @ dense["gain_state"][:, i if per_source else 0] for i in range(len(sources))]
        normed = lambda y: rms(y, dense["norm_channel"]["scale"]) if norm else y  # noqa: B023, E731
        fused_k, fused_v = k, v
        if variant == "input" and sources:
            if gate != "channel":
                fused_k = k + sum(g * s["k"] for g, s in zip(g_K, sources, strict=True))
                fused_k = rms(fused_k, dense["norm_state"]["scale"]) if norm else fused_k
            if gate != "state":
                fused_v = normed(v + sum(g * s["v"] for g, s in zip(g_V, sources, strict=True)))
        states = recur(decay, spread(fused_k), heads(fused_v) * step)
        written = (heads(v) * step).reshape(B, T, -1)
        if variant == "rank":
            for s, gk, gv in zip(sources, g_K, g_V, strict=True):
                states = states + recur(decay, spread(gk * s["k"]), heads(gv * s["written"]))
        y = jnp.einsum("bthk,bthkv->bthv", spread(q), states)
        below = [dict(k=k, v=v, written=written, states=states, y=y), *below]
        if variant == "read":
            for s, gk, gv in zip(sources, g_K, g_V, strict=True):
                lower = jnp.einsum("bthk,bthkv->bthv", spread(gk * q), s["states"]).reshape(B, T, -1)
                y = y + heads(gv * normed(lower))
        if variant == "output":
            for s, gv in zip(sources, g_V, strict=True):
                y = y + heads(gv * normed(s["y"].reshape(B, T, -1)))
        r = r + finish(y)
    return rms(r, params["final_norm"]["scale"])


CASES = [
    ("retnet", dict(variant="read", gate="both", per_source=True)),
    ("retnet", dict(variant="input", gate="both", norm=True)),
    ("retnet", dict(variant="rank", gate="both")),
    ("retnet", dict(variant="output")),
    ("mamba2", dict(variant="read", gate="state", norm=True)),
    ("mamba2", dict(variant="input", depth=1)),
    ("mamba2", dict(variant="rank")),
]


@pytest.mark.parametrize("name, case", CASES, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())))
def test_equals_stored_states(name, case):
    """Outputs and all parameters' gradients."""
    model, params = make(name, **case)
    weights = jax.random.normal(jax.random.key(9), (B, T, D))

    def run(hidden, dtype):
        def loss(params):
            y = hidden(params)
            return jnp.sum(y * weights.astype(dtype)), y

        gradients, y = jax.jit(jax.grad(loss, has_aux=True))(jax.tree.map(lambda x: x.astype(dtype), params))
        return y, gradients

    got = run(lambda p: model.apply(p, tokens())[0], jnp.float32)
    with jax.enable_x64(True):
        want = run(lambda p: naive(name, p, **case), jnp.float64)
    for (path, x), reference in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        scale = max(np.linalg.norm(reference), 1e-6)
        assert np.linalg.norm(x - np.asarray(reference)) < 5e-5 * scale, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "name, variant", [("retnet", "input"), ("retnet", "output"), ("mamba2", "read"), ("mamba2", "rank")]
)
def test_recurrent_equals_parallel(name, variant):
    """Also in packed and padded rows."""
    model, params = make(name, variant=variant, gate="channel" if variant == "output" else "both")
    segments = jnp.asarray([[0, 0, 0, 1, 1, 1, 1], [4, 4, 4, 4, 4, 7, 7]], jnp.int32)
    mask = jnp.asarray([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 0]], bool)
    whole = jax.jit(model.apply)(params, tokens(), segments, mask)[0]
    step = jax.jit(lambda p, t, s, m, state: model.apply(p, t, s, m, state))
    state, ys = model.init_state(B), []
    for t in range(T):
        y, state = step(params, *(v[:, t : t + 1] for v in (tokens(), segments, mask)), state)
        ys.append(y)
    keep = mask[..., None]
    np.testing.assert_allclose(jnp.where(keep, jnp.concatenate(ys, 1), 0), jnp.where(keep, whole, 0), atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retnet", "mamba2"])
def test_fresh_links_do_nothing(name):
    """The last gate matrix starts at zero, or, with `gate_std`, does not."""
    for std in (0.0, 0.5):
        model, _ = make(name, gate_std=std)
        params = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens()))
        plain = {"params": {k: {j: w for j, w in v.items() if j != "dense"} if "block" in k else v
                            for k, v in params["params"].items()}}  # fmt: skip
        want = jax.jit(make(name, variant="none")[0].apply)(plain, tokens())[0]
        difference = np.abs(jax.jit(model.apply)(params, tokens())[0] - want).max()
        assert difference < 2e-6 if std == 0 else difference > 1e-3


@pytest.mark.slow
def test_variants_differ():
    """Guards against one variant computed under another's name."""
    for name in ("retnet", "mamba2"):
        _, params = make(name, gate="none")
        outputs = [jax.jit(make(name, variant=v, gate="none")[0].apply)(params, tokens())[0] for v in VARIANTS]
        for i, first in enumerate(outputs):
            for second in outputs[i + 1 :]:
                if name == "mamba2":  # RetNet's decays are those of all layers: ungated, READ and RANK are one
                    assert np.abs(first - second).max() > 1e-3
        if name == "retnet":
            np.testing.assert_allclose(outputs[0], outputs[3], atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(variant="carry"),
            "variant='carry': must be one of 'read', 'input', 'output', 'rank'",
        ),
        (dict(projection="linear"), "projection='linear': must be 'identity' with mamba2 in model.pattern"),
        (dict(variant="rank", norm=True), "norm=True: must be False with variant='rank'"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        make("mamba2", **fields)


@pytest.mark.slow
@pytest.mark.parametrize("name, variant", [("retnet", "input"), pytest.param("mamba2", "read", marks=pytest.mark.slow)])
def test_scan_over_blocks_equals_unrolled(name, variant):
    """As the large presets run: streams in the carry of the scan, blocks computed again in the backward pass."""
    model, params = make(name, variant=variant, gate="both")
    config = model.config.copy_and_resolve_references()
    config = {**config.to_dict(), "scan_blocks": 1, "remat": "block"}
    scan = build(config, VOCABULARY)
    stacked = {"params": stack(params["params"], size=1, unrolled=2)}
    loss = lambda model: lambda p: jnp.sum(jnp.sin(model.apply(p, tokens())[0]))  # noqa: E731
    gradient = jax.jit(jax.grad(loss(scan)))(stacked)
    want = jax.jit(jax.grad(loss(model)))(params)
    want = {"params": stack(want["params"], size=1, unrolled=2)}
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4 * max(1, float(np.abs(y).max())))
    half = build({**config, "dtype": "bfloat16"}, VOCABULARY)
    assert jax.eval_shape(half.apply, stacked, tokens())[0].dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("name, variant", [("retnet", "input"), pytest.param("mamba2", "read", marks=pytest.mark.slow)])
def test_mesh_changes_nothing(name, variant):
    """Rows, heads and time over two devices each; values and gradients."""
    model, params = make(name, variant=variant, gate="both")
    rows = jnp.asarray(np.random.default_rng(6).integers(0, VOCABULARY, (4, 8)), jnp.int32)
    segments = jnp.asarray(np.cumsum(np.random.default_rng(7).random((4, 8)) < 0.2, axis=1), jnp.int32)

    def loss(params, rows, segments):
        y = model.apply(params, rows, segments)[0]
        return jnp.sum(jnp.sin(y)), y

    step = jax.jit(jax.grad(loss, has_aux=True))
    want = step(params, rows, segments)
    sizes = dict(data=2, tensor=2, sequence=2)
    mesh = jax.make_mesh([sizes.get(axis, 1) for axis in AXES], AXES, axis_types=(AxisType.Auto,) * len(AXES))
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        place = lambda x: jax.device_put(x, tokens_sharding(mesh))  # noqa: E731
        got = step(jax.device_put(params, unbox(param_shardings(boxed, mesh))), place(rows), place(segments))
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-3)
        assert error < 1e-4, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"
