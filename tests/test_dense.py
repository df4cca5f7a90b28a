"""DenseSSM against a naive model that stores every state of every layer, in float64, one token after the other."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.backbone import scanned
from seqmodels.configs.densemamba import get_config
from seqmodels.depth import vector
from seqmodels.errors import UserError
from seqmodels.kernels.tuning import UNROLLED
from seqmodels.mixers import mamba
from seqmodels.model import build

B, T, D, E, N, LAYERS = 2, 7, 8, 16, 3, 4
VARIANTS = ("read", "input", "output", "rank", "carry")


def make(layers=LAYERS, model=None, kept=False, **dense):
    """The small model with these fields of config.model.dense, and its perturbed parameters."""
    config = get_config().model.copy_and_resolve_references()
    with config.unlocked():
        # quick to compile; all others equal it. Only XLA keeps states (kernels/selective_scan/kept.py)
        config.implementation.selective_scan = "xla" if kept else "reference"
        config.update(dict(width=D, repeats=layers, **(model or {})))
        config.mamba.update(dict(state=N, dt_rank=2))
        config.dense.update({"variant": "read", "depth": 2, "bottleneck": 2, **dense})
    built = build(config, 11)
    draw = np.random.default_rng(1)

    def perturbed(path, x):
        """Where the parameter starts, roughly, and as much again at random."""
        name = path[-1].key
        start = {"A_log": np.log(np.arange(1, N + 1)), "dt_bias": -2.0, "D": 1.0, "scale": 1.0}.get(name, 0.0)
        return jnp.asarray(start + 0.25 * draw.normal(size=x.shape), jnp.float32)

    shapes = nn.unbox(jax.eval_shape(built.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    return built, jax.tree.map_with_path(perturbed, shapes)


def tokens(length=T):
    return jnp.asarray(np.random.default_rng(5).integers(0, 11, (B, length)), jnp.int32)


def hidden(model, params, tokens, **kwargs):
    return jax.jit(functools.partial(model.apply, **kwargs))(params, tokens)[0]


def recur(decay, write):
    """s_t = decay_t s_{t-1} + write_t, one token after the other; every state is kept: [B, T, E, N]."""

    def step(state, token):
        state = token[0] * state + token[1]
        return state, state

    decay, write = jnp.moveaxis(decay, 1, 0), jnp.moveaxis(write, 1, 0)
    return jnp.moveaxis(jax.lax.scan(step, jnp.zeros_like(write[0]), (decay, write))[1], 0, 1)


def naive(params, tokens, variant, depth=2, every=1, gate="channel", activation="silu", per_source=False,
          projection="identity", norm=False, layers=LAYERS, behind=False, kept=False):  # fmt: skip
    """Final hidden states, by the equations of seqmodels/depth/vector.py, with all states kept."""
    params = params["params"]
    silu, softplus = jax.nn.silu, jax.nn.softplus
    act = dict(silu=silu, sigmoid=jax.nn.sigmoid, identity=lambda v: v)[activation]
    rms = lambda v, scale: scale * v / jnp.sqrt(jnp.mean(v**2, -1, keepdims=True) + 1e-5)  # noqa: E731
    r = params["embedding"][tokens]
    below = []  # of each layer below, the nearest first: states, u, dt u, B, own readout
    for layer in range(layers):
        p = params[f"block_{layer}"]
        m, dense = p["mixer"], p.get("dense", {})
        x = r if behind else rms(r, p["norm"]["scale"])
        a, z = x @ m["in_proj"][:, 0], x @ m["in_proj"][:, 1]
        past = jnp.concatenate([jnp.zeros((B, 3, E)), a], 1)
        u = silu(m["conv_bias"] + sum(m["conv_weight"][k] * past[:, k : k + a.shape[1]] for k in range(4)))
        delta, key, C = jnp.split(u @ m["x_proj"], [2, 2 + N], -1)
        dt = softplus(delta @ m["dt_proj"] + m["dt_bias"])
        A = -jnp.exp(m["A_log"])
        sources = below[:depth] if layer % every == 0 else []
        count = len(sources)
        ones = [1.0] * count

        def mlp(name):
            inner = silu(x @ dense[name + "_in"])  # noqa: B023
            out = [act(inner @ dense[name + "_out"][:, s]) for s in range(count if per_source else 1)]  # noqa: B023
            return out if per_source else out * count  # noqa: B023

        g_E = mlp("gate_channel") if count and gate in ("channel", "both") else ones
        g_N = ones
        if count and (gate == "state" or (gate == "both" and variant == "input")):
            g_N = mlp("gate_state")
        elif count and gate == "both":
            gain = [1 + x @ dense["gain_state"][:, s] for s in range(count if per_source else 1)]
            g_N = gain if per_source else gain * count
        P = dense.get("projection", jnp.eye(N))

        written_u, written_key = u, key
        if variant == "input" and count:
            if gate != "state":
                written_u = u + sum(g * s["u"] for g, s in zip(g_E, sources, strict=True))
                written_u = rms(written_u, dense["norm_channel"]["scale"]) if norm else written_u
            if gate != "channel":
                written_key = key + sum(g * (s["key"] @ P.T) for g, s in zip(g_N, sources, strict=True))
                written_key = rms(written_key, dense["norm_state"]["scale"]) if norm else written_key
        decay = jnp.exp(dt[..., None] * A)
        added = jnp.zeros((*u.shape, N))  # by the layers below, at each token
        for i, s in enumerate(sources):
            gE, gN = (jnp.broadcast_to(g[i], (*u.shape[:2], size)) for g, size in ((g_E, E), (g_N, N)))
            if variant == "rank":
                added += (gE * s["write"])[..., None] * (gN * (s["key"] @ P.T))[..., None, :]
            if variant == "carry":
                added += gE[..., None] * gN[..., None, :] * (s["states"] @ P.T)
        states = recur(decay, (dt * written_u)[..., None] * written_key[..., None, :])
        fused = states + recur(decay, added)
        y_own = jnp.einsum("bten,btn->bte", states, C)
        y = jnp.einsum("bten,btn->bte", fused, C)
        for i, s in enumerate(sources):
            if variant == "read":
                term = jnp.einsum("bten,btn->bte", s["states"] @ P.T, g_N[i] * C)
                y += g_E[i] * (rms(term, dense["norm_channel"]["scale"]) if norm else term)
            if variant == "output":
                y += g_E[i] * (rms(s["y"], dense["norm_channel"]["scale"]) if norm else s["y"])
        branch = ((y + m["D"] * u) * silu(z)) @ m["out_proj"]
        r = r + (rms(branch, p["norm"]["scale"]) if behind else branch)
        below = [dict(states=states, u=u, write=dt * u, key=key, y=y_own), *below]
    return rms(r, params["final_norm"]["scale"])


CASES = [
    *[dict(variant=v) for v in VARIANTS],
    *[dict(variant=v, gate="both", projection="linear") for v in ("read", "input", "rank", "carry")],
    dict(variant="read", gate="state"),
    dict(variant="carry", gate="state", per_source=True),
    dict(variant="read", gate="none", depth=3),
    dict(variant="read", gate="both", per_source=True, projection="linear", activation="sigmoid"),
    dict(variant="read", norm=True, per_source=True),
    dict(variant="read", norm=True, gate="both", projection="linear", kept=True),
    dict(variant="input", norm=True, gate="both", activation="identity"),
    dict(variant="output", norm=True, gate="channel"),
    dict(variant="read", depth=6, kept=True),  # deeper than there are layers
    dict(variant="read", every=2, depth=1, kept=True),
    dict(variant="read", gate="both", behind=True),  # model.norms_behind: gates read what the branch reads
]


@pytest.mark.parametrize(
    "case",
    [CASES[0], *[pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:]]],
    ids=lambda case: "-".join(map(str, case.values())),
)
def test_equals_stored_states(case, monkeypatch):
    """Outputs and all parameters' gradients."""
    fields = {name: value for name, value in case.items() if name != "behind"}
    model, params = make(layers=3, model=dict(norms_behind="mamba" if "behind" in case else ""), **fields)
    length = T
    if "kept" in case:
        length = UNROLLED + 1
        for module in (mamba, vector):
            monkeypatch.setattr(module, "selective_scan", None)  # no states are scanned again
    weights = jax.random.normal(jax.random.key(9), (B, length, D))

    def loss(run, dtype):
        def f(params):
            y = run(params)
            return jnp.sum(y * weights.astype(dtype)), y

        gradients, y = jax.jit(jax.grad(f, has_aux=True))(jax.tree.map(lambda x: x.astype(dtype), params))
        return y, gradients

    got = loss(lambda p: model.apply(p, tokens(length))[0], jnp.float32)
    with jax.enable_x64(True):
        want = loss(lambda p: naive(p, tokens(length), layers=3, **case), jnp.float64)
    for (path, x), reference in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        scale = max(np.linalg.norm(reference), 1e-6)
        assert np.linalg.norm(x - np.asarray(reference)) < 5e-5 * scale, jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [dict(gate="both", per_source=True), dict(gate="none")], ids=["gates", "none"])
def test_more_states_than_one_scan_holds(case, monkeypatch):
    monkeypatch.setattr(vector, "GROUPS", 2)  # the layer's own and one below: the other has a scan to itself
    test_equals_stored_states(dict(variant="read", **case), monkeypatch)


@pytest.mark.parametrize(
    ("variant", "gate"),
    [
        *[(v, "channel") for v in VARIANTS],
        *[pytest.param(v, "both", marks=pytest.mark.slow) for v in VARIANTS],
        pytest.param("read", "state", marks=pytest.mark.slow),
    ],
)
def test_fresh_dense_mamba_is_mamba(variant, gate):
    """The last gate matrix starts at zero."""
    if variant == "output" and gate != "channel":
        with pytest.raises(UserError, match="output"):
            make(variant=variant, gate=gate)
        return
    dense, params = make(layers=3, variant=variant, gate=gate)
    mamba, _ = make(layers=3, variant="none")
    zero = lambda path, x: jnp.zeros_like(x) if any(  # noqa: E731
        k.key in ("gate_channel_out", "gate_state_out", "gain_state") for k in path
    ) else x  # fmt: skip
    params = jax.tree.map_with_path(zero, params)
    if variant == "read":
        fresh = nn.unbox(jax.jit(dense.init)(jax.random.key(0), tokens()))["params"]["block_1"]["dense"]
        assert all(not fresh[k].any() for k in fresh if k in ("gate_channel_out", "gate_state_out", "gain_state"))
    plain = {"params": {k: {j: w for j, w in v.items() if j != "dense"} if "block" in k else v
                        for k, v in params["params"].items()}}  # fmt: skip
    many = tokens(UNROLLED + 3)  # so many that the scan is one loop, which XLA does not fuse with what is around it
    # INPUT and RANK have the same sums, rounded in another order. The others have the same scan beside other groups:
    # what XLA contracts to fused multiply-adds may differ by the last bit.
    tolerance = 2e-6 if variant in ("input", "rank") else 2.0**-22
    np.testing.assert_allclose(hidden(dense, params, many), hidden(mamba, plain, many), rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant", ["read", *[pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS[1:]]])
def test_recurrent_equals_parallel(variant):
    """Also in packed and padded rows, and causally; READ with states kept where all tokens come in one call."""
    T, kept = (10, True) if variant == "read" else (7, False)
    gate = "channel" if variant == "output" else "both"
    model, params = make(layers=3, variant=variant, gate=gate, kept=kept)
    segments = jnp.asarray([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2], [4, 4, 4, 4, 4, 7, 7, 7, 7, 7]], jnp.int32)[:, :T]
    mask = jnp.asarray([[0, 1, 1, 1, 1, 1, 1, 1, 0, 1], [1, 1, 1, 0, 1, 1, 0, 1, 1, 1]], bool)[:, :T]
    whole = hidden(model, params, tokens(T), segment_ids=segments, mask=mask)
    step = jax.jit(lambda p, t, s, m, state: model.apply(p, t, s, m, state))
    state, ys = model.init_state(B), []
    for t in range(T):
        y, state = step(params, *(v[:, t : t + 1] for v in (tokens(T), segments, mask)), state)
        ys.append(y)
    keep = mask[..., None]
    np.testing.assert_allclose(jnp.where(keep, jnp.concatenate(ys, 1), 0), jnp.where(keep, whole, 0), atol=3e-5)
    changed = hidden(model, params, tokens(T).at[:, 4].add(1) % 11, segment_ids=segments, mask=mask)
    np.testing.assert_array_equal(jnp.where(keep, changed, 0)[:, :4], jnp.where(keep, whole, 0)[:, :4])


def test_shared_gate_equals_two_equal_gates():
    shared, params = make(variant="read")
    single, _ = make(variant="read", per_source=True)
    twice = lambda path, x: jnp.repeat(x, int(path[1].key[-1]) if path[1].key != "block_3" else 2, axis=1) if (  # noqa: E731
        path[-1].key == "gate_channel_out") else x  # fmt: skip
    both = jax.tree.map_with_path(twice, params)
    np.testing.assert_allclose(hidden(shared, params, tokens()), hidden(single, both, tokens()), atol=2e-6)


@pytest.mark.slow
def test_variants_differ():
    """Guards against one variant computed under another's name."""
    _, params = make(variant="read", gate="none")
    outputs = {v: hidden(make(variant=v, gate="none")[0], params, tokens()) for v in VARIANTS}
    for i, first in enumerate(VARIANTS):
        for second in VARIANTS[i + 1 :]:
            assert np.abs(outputs[first] - outputs[second]).max() > 1e-3, (first, second)  # rounding is 1e-6


def stacked(params, first, group):
    """Parameters of unrolled blocks as those of a scan over super-blocks of `group` blocks from block `first` on."""
    p = dict(params["params"])
    blocks = [p.pop(f"block_{i}") for i in range(first, LAYERS)]
    groups = [blocks[i : i + group] for i in range(0, len(blocks), group)]
    trees = [{f"block_{j}": b for j, b in enumerate(g)} for g in groups]
    p["blocks"] = jax.tree.map(lambda *x: jnp.stack(x), *trees)
    return {"params": p}


@functools.cache
def unrolled(variant):
    """Sum and gradients of blocks that run one by one and save everything."""
    model, params = make(variant=variant)
    return jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(model.apply(p, tokens())[0]))))(params)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "group"), [("none", 2), ("read", 2), *[(v, 1) for v in VARIANTS]])
def test_scan_over_blocks_equals_unrolled(variant, group):
    model, params = make(variant=variant)
    scan, _ = make(variant=variant, model=dict(scan_blocks=group, remat="streams"))
    first = 0 if variant == "none" else 2
    packed = stacked(params, first, group)
    assert jax.tree.map(jnp.shape, packed) == jax.tree.map(
        jnp.shape, make(variant=variant, model=dict(scan_blocks=group))[1]
    )
    value, gradient = jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(scan.apply(p, tokens())[0]))))(packed)
    want, want_gradient = unrolled(variant)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(stacked(want_gradient, first, group)), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4 * max(1, float(np.abs(y).max())))
    state = scan.init_state(B)
    assert all(x.shape[0] == B for x in jax.tree.leaves(state))
    piece = jax.jit(lambda p, t, s: scan.apply(p, t, state=s))
    y, state = piece(packed, tokens()[:, :3], state)
    z, _ = piece(packed, tokens()[:, 3:6], state)
    np.testing.assert_allclose(jnp.concatenate([y, z], 1), hidden(model, params, tokens())[:, :6], atol=3e-5)


@pytest.mark.parametrize(("fields", "layers"), [(dict(), 4), (dict(remat="block"), 0), (dict(scan_blocks=1), 0)])
def test_states_are_kept_where_they_are_not_saved_twice(monkeypatch, fields, layers):
    calls, keep = [], mamba.kept.keep
    monkeypatch.setattr(mamba.kept, "keep", lambda *args, **rest: calls.append(rest["queries"]) or keep(*args, **rest))
    model, params = make(model=fields, kept=True)
    jax.eval_shape(model.apply, params, tokens(UNROLLED + 1))
    assert calls == [3] * layers  # the layer's own and those of two layers above


def gradient(remat):
    """That of the READ model, which keeps what `model.remat` says for the backward pass."""
    model, params = make(model=dict(remat=remat))
    return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.apply(p, tokens())[0]))))(params)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["rescan", "mixer", "projected", "scan", "block", "dots", "streams"])
def test_rematerialisation_changes_nothing(remat):
    for x, y in zip(jax.tree.leaves(gradient(remat)), jax.tree.leaves(unrolled("read")[1]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * max(1, float(np.abs(y).max())))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["mamba", "mamba2"])
def test_rematerialisation_keeps_less(pattern):
    """Each in turn keeps fewer bytes for the backward pass than the one before."""

    def kept(remat):
        fields = dict(pattern=pattern, remat=remat, mamba2=dict(state=4, head_dim=8), dense=dict(variant="none"))
        config = get_config().model.copy_and_resolve_references()
        config.unlock()
        config.update(fields)
        model = build(config, 11)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens())
        backward = jax.eval_shape(lambda p: jax.vjp(lambda p: model.apply(p, tokens())[0], p)[1], params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))

    sizes = [kept(remat) for remat in ("none", "rescan", "mixer", "projected", "block")]
    assert sizes == sorted(set(sizes), reverse=True)


@pytest.mark.parametrize(("repeats", "depth", "scanned_over"), [(2, 2, 0), (3, 2, 1), (4, 2, 2), (3, 4, 0)])
def test_scan_over_blocks_begins_where_m_streams_are_below(repeats, depth, scanned_over):
    model, params = make(depth=depth, layers=repeats, model=dict(scan_blocks=1))
    assert scanned(model.config)[1] == scanned_over
    y, state = jax.eval_shape(model.apply, params, tokens())
    assert y.shape[:2] == tokens().shape
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, model.init_state(B))


@pytest.mark.slow
def test_the_first_blocks_are_rematerialised_alone():
    """Each block less that is computed again keeps as many bytes more; the gradients are the same."""
    x = tokens()

    def built(fields):
        config = get_config().model.copy_and_resolve_references()
        config.unlock()
        config.update(dict(dense=dict(variant="none"), **fields))
        return build(config, 11)

    def kept(model):
        pull = jax.eval_shape(lambda p: jax.vjp(lambda p: model.apply(p, x)[0], p)[1], params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull))

    def gradient(model):
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.apply(p, x)[0]))))(params)

    none, *some = built(dict(remat="none")), *(built(dict(remat="block", remat_blocks=n)) for n in (1, 2, 3, 0))
    params = jax.jit(none.init)(jax.random.key(0), x)
    sizes = [kept(model) for model in (none, *some)]
    assert sizes == sorted(set(sizes), reverse=True)
    for got, want in zip(jax.tree.leaves(gradient(some[1])), jax.tree.leaves(gradient(none)), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6 * max(1, float(np.abs(want).max())))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(variant="reed"), "variant='reed': must be one of 'none', 'read', 'input'"),
        (dict(gate="chanel"), "gate='chanel': must be one of 'channel'"),
        (dict(variant="carry", norm=True), "norm=True: must be False with variant='carry'"),
        (dict(variant="output", projection="linear"), "projection='linear': must be 'identity' with variant='output'"),
        (
            dict(model=dict(pattern="attention"), variant="read"),
            "variant='read': must be 'none' without one of h3, mamba, mamba2, retnet, s4, s4d",
        ),
        (dict(model=dict(scan_blocks=3)), "scan_blocks=3: must be 0, or a divisor of model.repeats="),
        (dict(model=dict(scan_blocks=1), every=2), "every=2: must be a divisor of"),
        (dict(model=dict(scan_blocks=1, remat_blocks=2)), "remat_blocks=2: must be 0 with model.scan_blocks=1"),
        (dict(model=dict(pattern="mamba+mpl")), "'mpl' of word 1, 'mamba\\+mpl', must be one of .*mlp"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        make(**fields)
