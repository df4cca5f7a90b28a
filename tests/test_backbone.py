"""The stack of blocks: steps side by side, norms, biases, both directions, and connections across depth."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from seqmodels import backbone, depth
from seqmodels.backbone import Backbone, context
from seqmodels.configs import mamba, transformer
from seqmodels.configs.mamba import add_mamba
from seqmodels.errors import UserError
from seqmodels.model import build
from seqmodels.sequence import make_sequence

B, T, D = 2, 6, 16


def config_of(pattern, **fields):
    """config.model of a small stack."""
    config = transformer.get_config().model.copy_and_resolve_references()
    with config.unlocked():
        add_mamba(type("Holder", (), {"model": config}))
        config.update(dict(width=D, repeats=1, pattern=pattern) | fields)
        config.attention.update(dict(heads=2, kv_heads=2))
        config.mlp.hidden = 24
    return config


def perturbed(variables):
    leaves, tree = jax.tree.flatten(nn.unbox(variables))
    draw = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [jnp.asarray(x + 0.3 * draw.normal(size=x.shape), jnp.float32) for x in leaves])


def make(pattern, **fields):
    """The stack, its perturbed parameters, and an input."""
    stack, (seq, *_) = Backbone(FrozenConfigDict(config_of(pattern, **fields))), make_sequence(B, T)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, D)), jnp.float32)
    return stack, perturbed(jax.jit(stack.init)(jax.random.key(0), x, seq)), x, seq


def rms(x, scale):
    return scale * x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5)


@pytest.mark.slow
def test_branches_side_by_side_read_the_same_normed_input():
    """GPT-NeoX's parallel residual: x + attention(norm(x)) + mlp(norm(x)), with one norm."""
    stack, variables, x, seq = make("attention|mlp")
    params = variables["params"]
    assert set(params["block_0"]) == {"norm", "mixer", "mixer_1"}
    normed = jnp.asarray(rms(np.asarray(x, np.float64), np.asarray(params["block_0"]["norm"]["scale"])), jnp.float32)
    attention, mlp = (backbone.branch_of(stack.config, name) for name in ("attention", "mlp"))
    want = x + attention.apply({"params": params["block_0"]["mixer"]}, normed, seq)[0]
    want = want + mlp.apply({"params": params["block_0"]["mixer_1"]}, normed, seq)[0]
    got, _ = stack.apply(variables, x, seq)
    np.testing.assert_allclose(
        got, rms(np.asarray(want), np.asarray(params["final_norm"]["scale"])), rtol=2e-4, atol=2e-4
    )


def test_three_branches_one_after_the_other():
    _, variables, *_ = make("mamba+attention+mlp")
    assert set(variables["params"]["block_0"]) == {"norm", "mixer", "mlp_norm", "mlp", "norm_2", "branch_2"}


@pytest.mark.slow
def test_layer_norm_and_biases():
    stack, variables, x, seq = make("attention+mlp", norm="layer", bias=True)
    params = variables["params"]
    assert set(params["final_norm"]) == {"scale", "bias"} == set(params["block_0"]["norm"])
    assert {name for name in params["block_0"]["mixer"] if name.endswith("_bias")} == {
        "query_bias", "key_bias", "value_bias", "out_bias",
    }  # fmt: skip
    grads = jax.grad(lambda v: jnp.sum(jnp.sin(stack.apply(v, x, seq)[0])))(variables)
    dead = [path for path, g in jax.tree.leaves_with_path(grads) if not np.abs(g).max() > 0]
    # a softmax does not change when all its scores grow by the same number, so the keys' bias counts only by rotation
    assert not dead, dead


def test_biases_that_nothing_has_are_refused():
    with pytest.raises(
        UserError, match=r"config.model.bias=True: must be False with .*'mamba', where nothing has a bias"
    ):
        build(config_of("mamba", bias=True), 11)
    build(config_of("mamba", bias=True, norm="layer"), 11)
    build(config_of("mamba+mlp", bias=True), 11)


def test_norm_without_biases_has_none():
    _, variables, *_ = make("mamba", norm="layer")
    assert set(variables["params"]["final_norm"]) == {"scale"}


@pytest.mark.parametrize(
    ("pattern", "taps"), [("mamba|mlp mamba+attention+mlp", 0), ("mamba attention|mlp", 0), ("mamba|attention+mlp", 3)]
)
def test_state_carries_over_any_pattern(pattern, taps):
    """Tokens one at a time, from the state, equal the whole."""
    model = build(config_of(pattern, short_conv=taps), 11)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 11, (B, T)), jnp.int32)
    variables = perturbed(jax.jit(model.init)(jax.random.key(0), tokens))
    want, last = jax.jit(model.apply)(variables, tokens)
    state, step = model.init_state(B, T), jax.jit(lambda v, t, s: model.apply(v, t, state=s))
    got = []
    for t in range(T):
        hidden, state = step(variables, tokens[:, t : t + 1], state)
        got.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), want, rtol=2e-4, atol=2e-5)
    assert jax.tree.structure(state) == jax.tree.structure(last)


def test_a_short_convolution_before_every_mixer_of_time():
    """x + mixer(n + conv(n)) with n = norm(x); the convolution is numpy's, the mixer the branch by itself."""
    stack, variables, x, seq = make("attention|mlp", short_conv=3)
    params = variables["params"]["block_0"]
    assert set(params) == {"norm", "mixer", "mixer_conv", "mixer_1"}, "a mixer of channels has none"
    normed = rms(np.asarray(x, np.float64), np.asarray(params["norm"]["scale"]))
    taps = np.asarray(params["mixer_conv"]["taps"], np.float64)
    conv = np.stack([[np.convolve(normed[b, :, c], taps[::-1, c])[:T] for c in range(D)] for b in range(B)]).swapaxes(
        1, 2
    )
    attention, mlp = (backbone.branch_of(stack.config, name) for name in ("attention", "mlp"))
    want = x + attention.apply({"params": params["mixer"]}, jnp.float32(normed + conv), seq)[0]
    want = want + mlp.apply({"params": params["mixer_1"]}, jnp.float32(normed), seq)[0]
    got, _ = stack.apply(variables, x, seq)
    final = np.asarray(variables["params"]["final_norm"]["scale"])
    np.testing.assert_allclose(got, rms(np.asarray(want), final), rtol=2e-4, atol=2e-4)
    assert set(stack.init_state(1, T)["block_0"]) == {"mixer", "mixer_conv"}


@pytest.mark.slow
def test_a_short_convolution_in_both_directions_and_beside_dense_links():
    _, variables, *_ = make("bi:attention+mlp", short_conv=2)
    assert set(variables["params"]["block_0"]["mixer_conv"]) == {"ahead", "back"}
    dense = config_of("mamba").dense.copy_and_resolve_references()
    dense.update(variant="read", bottleneck=4)
    stack, variables, x, seq = make("mamba", short_conv=2, repeats=2, dense=dense)
    without = jax.tree_util.tree_map_with_path(
        lambda path, v: 0 * v if "mixer_conv" in jax.tree_util.keystr(path) else v, variables
    )
    plain = Backbone(FrozenConfigDict(config_of("mamba", repeats=2, dense=dense)))
    bare = {"params": {k: {n: w for n, w in v.items() if n != "mixer_conv"} for k, v in variables["params"].items()}}
    np.testing.assert_allclose(stack.apply(without, x, seq)[0], plain.apply(bare, x, seq)[0], rtol=1e-5, atol=1e-5)
    assert np.abs(stack.apply(variables, x, seq)[0] - plain.apply(bare, x, seq)[0]).max() > 1e-2


def test_both_directions_have_no_state_and_no_next_token():
    stack, variables, x, seq = make("bi:mamba+mlp")
    assert set(variables["params"]["block_0"]["mixer"]) == {"ahead", "back"}
    early = stack.apply(variables, x.at[:, -1].add(1.0), seq)[0][:, 0] - stack.apply(variables, x, seq)[0][:, 0]
    assert np.abs(early).max() > 1e-4, "the first output must depend on the last token"
    with pytest.raises(UserError, match="'bi:' reads both directions of time and has no state"):
        stack.init_state(1)
    with pytest.raises(UserError, match=r"model.head='next_token': must be .*'bi:mamba', which reads ahead"):
        build(config_of("bi:mamba"), 11)


def test_an_unknown_option_of_a_branch_is_refused():
    config = config_of("mamba")
    with config.unlocked():
        config.mamba.sate = 8
    with pytest.raises(UserError, match=r"config.model.mamba.sate=8: no such field; did you mean model.mamba.state"):
        build(config, 11)


def test_context_is_that_of_caches():
    run = mamba.get_config()
    assert context(run) is None
    run = transformer.get_config()
    assert context(run) == run.seq_len
    run.model.attention.window = run.seq_len // 4
    assert context(run) is None, "a window forgets, so any length can be read"


# Connections across depth


class FromBelow(depth.Connection):
    """A toy: each step reads, beside the residual stream, a learned multiple of what the step before it wrote."""

    width: int = D

    def setup(self):
        self.gain = self.param("gain", nn.initializers.constant(0.5), (self.width,))

    @nn.nowrap
    def start(self, x, blocks=()):
        return jnp.zeros_like(x)

    def enter(self, x, carry, step):
        return x + self.gain * carry, carry

    def leave(self, x, y, carry, step):
        return x + y, y


@pytest.fixture
def from_below(monkeypatch):
    monkeypatch.setattr(depth, "kind", lambda config: "from_below")
    monkeypatch.setattr(depth, "connection_of", lambda *_, **parent: FromBelow(**parent))


@pytest.mark.parametrize(
    "fields",
    [
        dict(scan_blocks=2),
        *[pytest.param(v, marks=pytest.mark.slow) for v in ({}, dict(scan_blocks=1), dict(remat="block"))],
    ],
)
def test_a_connection_across_depth(from_below, fields):
    """By hand from the blocks' parts, however the stack runs."""
    stack, variables, x, seq = make("mamba+mlp", **{"repeats": 4, **fields})
    params = variables["params"]
    size = fields.get("scan_blocks", 0)

    def of(layer):
        if not size:
            return params[f"block_{layer}"]
        return jax.tree.map(lambda leaf: leaf[layer // size], params["blocks"][f"block_{layer % size}"])

    parts = {name: backbone.branch_of(stack.config, name) for name in ("mamba", "mlp")}

    @jax.jit
    def by_hand(x):
        below = jnp.zeros_like(x)
        for layer in range(4):
            for norm, place, name in (("norm", "mixer", "mamba"), ("mlp_norm", "mlp", "mlp")):
                h = x + of(layer)["from_below"]["gain"] * below
                h = h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-5) * of(layer)[norm]["scale"]
                below, _ = parts[name].apply({"params": of(layer)[place]}, h, seq)
                x = x + below
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * params["final_norm"]["scale"]

    run = jax.jit(functools.partial(stack.apply, variables))
    np.testing.assert_allclose(run(x, seq)[0], by_hand(x), rtol=2e-4, atol=2e-4)


def test_dense_links_want_one_kind_of_branch_a_block():
    dense = config_of("mamba").dense
    with dense.unlocked():
        dense.variant, dense.bottleneck = "read", 4
    for pattern, words in (("attention+mlp", "without one of h3, mamba"), ("mamba+mamba", "one branch a block")):
        with pytest.raises(UserError, match=f"config.model.dense.variant='read': must be .*{words}"):
            build(config_of(pattern, dense=dense), 11)
