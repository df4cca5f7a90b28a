"""RetNet and DenseRetNet against float64 forms written from torchscale's and DenseRetNet's formulas."""

import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.channels.mlp import Mlp
from seqmodels.configs import denseretnet, retnet
from seqmodels.configs.base import base
from seqmodels.errors import UserError
from seqmodels.interop.denseretnet import config_of
from seqmodels.interop.huggingface import from_huggingface
from seqmodels.interop.pretrained import load
from seqmodels.mixers.retnet import RetNet, log_decay
from seqmodels.model import build
from seqmodels.sequence import make_sequence

B, T, D, H, K, V = 2, 40, 12, 3, 4, 6


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def turn(x, first=0):
    """Rotated by position: x [B, T, H, K]; channels 2j and 2j + 1 are a complex number, theta from 1 to 1e-4."""
    theta = 10000.0 ** -np.linspace(0, 1, x.shape[-1] // 2)
    angle = (first + np.arange(x.shape[1]))[:, None, None] * theta
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def parallel(q, k, v, gamma, scaled, clamped=False):
    """torchscale's parallel form: scores by decays, each row over sqrt(sum of its decays); o [B, T, H, V]."""
    age = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])
    decay = np.where(age >= 0, gamma[:, None, None] ** np.maximum(age, 0), 0)
    if scaled:
        decay = decay / np.sqrt(decay.sum(-1, keepdims=True))
    scores = np.einsum("bthk,bshk->bhts", q, k) * decay
    if clamped:
        scores = scores / np.clip(np.abs(scores).sum(-1, keepdims=True), 1, 5e4)
    return np.einsum("bhts,bshv->bthv", scores, v)


def recurrent(q, k, v, gamma):
    """The recurrent form with its running scale, which is what `scaled` is in the parallel form."""
    state, scale, out = np.zeros((len(q), *q.shape[2:], v.shape[-1])), np.zeros(len(gamma)), []
    for t in range(q.shape[1]):
        new = scale * gamma + 1
        keep = gamma * np.sqrt(scale / new)
        write = np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t]) / np.sqrt(new)[:, None, None]
        state, scale = state * keep[:, None, None] + write, new
        out.append(np.einsum("bhk,bhkv->bhv", q[:, t], state))
    return np.stack(out, 1)


def rms(x, eps, scale=1.0):
    return scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def silu(x):
    return x / (1 + np.exp(-x))


GAMMA = {
    "octaves": 1 - 2.0 ** (-5 - np.arange(H)),
    "spread": 1 - np.exp(np.linspace(math.log(1 / 32), math.log(1 / 512), H)),
}


def mixer(params=None, **fields):
    module = RetNet(width=D, heads=H, key_dim=K, value_dim=V, **fields)
    if params is None:
        variables = module.init(jax.random.key(0), jnp.zeros((1, 1, D)), make_sequence(1, 1)[0])
        leaves = jax.tree.leaves_with_path(nn.unbox(variables["params"]))
        params = {path[-1].key: x + 0.3 * draw(*x.shape, seed=i) for i, (path, x) in enumerate(leaves)}
    return module, params


def projected(params, x):
    q, k, v, gate = (np.einsum("btd,dhk->bthk", x, params[f"{name}_proj"]) for name in ("q", "k", "v", "gate"))
    return turn(q), turn(k * K**-0.5), v, silu(gate)


@pytest.mark.parametrize("schedule", GAMMA)
@pytest.mark.parametrize("scaled", [False, True])
def test_equals_the_parallel_and_the_recurrent_form(schedule, scaled):
    module, params = mixer(schedule=schedule, row_scale=scaled, norm_eps=1e-3)
    x = draw(B, T, D, seed=9)
    q, k, v, gate = projected(params, x)
    o = parallel(q, k, v, GAMMA[schedule], scaled)
    if scaled:
        np.testing.assert_allclose(recurrent(q, k, v, GAMMA[schedule]), o, rtol=1e-9, atol=1e-12)
    want = np.einsum("bthv,hvd->btd", rms(o, 1e-3) * gate, params["out_proj"])
    float32 = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), params)
    got, _ = module.apply({"params": float32}, jnp.asarray(x, jnp.float32), make_sequence(B, T)[0])
    assert np.abs(got - want).max() < 1e-5 * want.std()


def test_the_norm_undoes_the_row_scale_only_without_its_epsilon():
    """At the epsilon of torchscale the forms with and without differ by percents in a fresh model."""
    x = jnp.asarray(draw(B, T, D), jnp.float32)

    def outputs(eps):
        module, _ = mixer(norm_eps=eps, row_scale=False)
        params = module.init(jax.random.key(0), x, make_sequence(B, T)[0])
        return [
            mixer(params, norm_eps=eps, row_scale=scaled)[0].apply(params, x, make_sequence(B, T)[0])[0]
            for scaled in (False, True)
        ]

    plain, scaled = outputs(1e-6)
    assert np.abs(plain - scaled).max() > 1e-2 * plain.std()
    plain, scaled = outputs(1e-20)
    assert np.abs(plain - scaled).max() < 1e-5 * plain.std()


def test_decays():
    np.testing.assert_allclose(np.exp(log_decay(2, "octaves")), [31 / 32, 63 / 64], rtol=1e-6)
    np.testing.assert_allclose(np.exp(log_decay(4, "spread"))[[0, -1]], [31 / 32, 511 / 512], rtol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_mlp_with_gelu_is_the_papers_or_torchscales(gated):
    module = Mlp(width=4, hidden=6, activation="gelu", gated=gated)
    params = {"gate": draw(4, 6), "down": draw(6, 4, seed=1)} | ({"up": draw(4, 6, seed=2)} if gated else {})
    x = draw(3, 4, seed=3)
    hidden = x @ params["gate"]
    hidden = hidden * (1 + np.vectorize(math.erf)(hidden / 2**0.5)) / 2
    want = (hidden * (x @ params["up"] if gated else 1)) @ params["down"]
    y, _ = module.apply({"params": params}, x[None], make_sequence(1, 3)[0])
    np.testing.assert_allclose(y[0], want, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"config.model.mlp.activation='tanh': must be one of 'silu', 'gelu', .*'relu'"):
        Mlp(width=4, activation="tanh")


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(schedule="linear"), "config.model.retnet.schedule='linear': must be one of 'octaves', 'spread'"),
        (dict(activation="tanh"), "config.model.retnet.activation='tanh': must be one of 'identity', 'silu'"),
        (dict(key_dim=3), "config.model.retnet.key_dim=3: must be even"),
        (dict(heads=5, key_dim=0), "config.model.retnet.heads=5: must be a divisor of model.width=12"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        RetNet(**dict(width=D, heads=H, key_dim=K, value_dim=V) | fields)


# DenseRetNet: a file as its authors' code writes it, and what their equations make of it

LAYERS, VOCABULARY = 3, 11


def tensors_of(width, layers, vocabulary, heads, keys, values, keys_rank, values_rank):
    """Shape of each tensor in their files by its name; keys and values are those of all heads."""
    shapes = {f"{name}.weight": (vocabulary, width) for name in ("model.embed_tokens", "lm_head")}
    shapes["model.norm.weight"] = (width,)
    for i in range(layers):
        layer = {
            "q_proj": (keys, width),
            "k_proj": (keys, width),
            "to_hidden.0": (2 * values, width),
            "to_out.0": (width, values),
            "group_norm": (values // heads,),
            "k_select.fc1": (keys_rank, width),
            "k_select.fc2": (keys, keys_rank),
            "v_select.fc1": (values_rank, width),
            "v_select.fc2": (values, values_rank),
            "k_norm": (keys,),
            "v_norm": (values,),
        }
        shapes |= {f"model.layers.{i}.self_attn.{name}.weight": shape for name, shape in layer.items()}
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (width,)
    return shapes


def random_file(depth):
    """Their tensors by name, and config, of a tiny model.

    A draw in which no readout is less than a twentieth of what it is the sum of: the norm behind it makes what is left
    after cancelling, and its rounding, large again.
    """
    shapes = tensors_of(D, LAYERS, VOCABULARY, H, H * K, H * V, 4, 2)
    tensors = {
        name: draw(*shape, seed=1700 + i).astype(np.float32) * 0.4 + np.float32("norm" in name)
        for i, (name, shape) in enumerate(shapes.items())
    }
    tensors["model.retnet_rel_pos.angle"], tensors["model.retnet_rel_pos.decay"] = np.zeros((2, 3), np.float32)
    return tensors, dict(model_type="llama", dense_block_layers=depth)


def theirs(tensors, tokens, depth, form):
    """Logits of DenseRetNet in float64; `form` is `recurrent` or a `parallel`: q, k, v, gamma to o."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    r = w["model.embed_tokens.weight"][tokens]
    below = []
    for i in range(LAYERS):
        p = {k.removeprefix(f"model.layers.{i}."): v for k, v in w.items() if k.startswith(f"model.layers.{i}.")}
        a = {k.removeprefix("self_attn."): v for k, v in p.items()}
        x = rms(r, 1e-6, p["input_layernorm.weight"])
        q, k = silu(x @ a["q_proj.weight"].T), silu(x @ a["k_proj.weight"].T) * K**-0.5
        v, u = np.split(silu(x @ a["to_hidden.0.weight"].T), 2, axis=-1)
        fused = []
        for letter, feature, index in (("k", k, 0), ("v", v, 1)):
            if below:
                gate = silu(silu(x @ a[f"{letter}_select.fc1.weight"].T) @ a[f"{letter}_select.fc2.weight"].T)
                feature = feature + gate * sum(features[index] for features in below[-depth:])
                feature = rms(feature, 1e-6, a[f"{letter}_norm.weight"])
            fused.append(feature)
        below.append((k, v))
        heads = lambda y: y.reshape(*y.shape[:2], H, -1)  # noqa: E731
        o = form(turn(heads(q)), turn(heads(fused[0])), heads(fused[1]), GAMMA["octaves"])
        o = rms(o, 1e-6, a["group_norm.weight"]).reshape(u.shape)
        r = r + (o * u) @ a["to_out.0.weight"].T
    return rms(r, 1e-6, w["model.norm.weight"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize("depth", [1, 2])
def test_denseretnet_equals_its_authors_equations(depth):
    tensors, config = random_file(depth)
    fields, params = from_huggingface(tensors, config)
    settings = base().model
    settings.update(fields)
    model = build(settings, VOCABULARY)
    declared = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, declared)
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, (B, T))
    hidden, _ = model.apply({"params": params}, jnp.asarray(tokens, jnp.int32))
    got = model.apply({"params": params}, hidden, method="logits")
    want = theirs(tensors, tokens, depth, recurrent)
    assert want.std() > 0.5
    assert np.abs(got - want).max() < 2e-5 * want.std()
    # Their training form divides each row by its absolute sum too, if that is above one: gone in the norm, but for eps.
    clamped = theirs(tensors, tokens, depth, lambda *a: parallel(*a, scaled=True, clamped=True))
    assert np.abs(clamped - want).max() < 1e-3 * want.std()


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_denseretnet_from_a_file(weights, tmp_path):
    """As the checkpoints are (pytorch_model.bin), and in the other format."""
    tensors, config = random_file(2)
    if weights == "pytorch_model.bin":
        torch = pytest.importorskip("torch")
        torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, tmp_path / weights)
    else:
        pytest.importorskip("safetensors.numpy").save_file(tensors, tmp_path / weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (got, params), (want, want_params) = load(tmp_path), from_huggingface(tensors, config)
    assert got == want
    jax.tree.map(np.testing.assert_array_equal, params, want_params)


def test_denseretnet_files_that_do_not_fit():
    tensors, config = random_file(1)
    with pytest.raises(UserError, match="dense_block_layers"):
        from_huggingface(tensors, {"model_type": "llama"})
    with pytest.raises(UserError, match=r"missing model\.layers\.2\.self_attn\.k_norm\.weight$"):
        from_huggingface({k: v for k, v in tensors.items() if "2.self_attn.k_norm" not in k}, config)
    with pytest.raises(UserError, match=r"missing model\.norm\.weight$"):
        from_huggingface({k: v for k, v in tensors.items() if k != "model.norm.weight"}, config)


# parameters, depth of the links and `tensors_of` the released checkpoints, and of the configs in the authors'
# repository with the same 32,001 tokens
PUBLISHED = {
    "350m": (373_277_184, 2, (1536, 16, 32_001, 2, 768, 3072, 192, 48)),
    "1.3b": (1_387_783_680, 2, (2560, 25, 32_001, 4, 1280, 5120, 160, 320)),
    "350m-code": (367_968_768, 1, (1536, 16, 32_001, 2, 768, 3072, 48, 48)),
    "1.3b-code": (1_334_023_680, 1, (2560, 25, 32_001, 4, 1280, 5120, 80, 80)),
}


def count(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("preset", PUBLISHED)
def test_denseretnet_presets_are_the_published_models(preset):
    """Their fields, and parameters but for the links of layer 0, which the files hold and nothing reads."""
    parameters, depth, sizes = PUBLISHED[preset]
    shapes = tensors_of(*sizes)
    assert sum(map(math.prod, shapes.values())) == parameters
    model = denseretnet.get_config(preset).model
    links = ("k_select", "v_select", "k_norm", "v_norm")
    unused = [
        math.prod(shape)
        for name, shape in shapes.items()
        if name.startswith(tuple(f"model.layers.0.self_attn.{x}" for x in links))
    ]
    assert count(build(model, 32_001)) + sum(unused) == parameters
    empty = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    read, ours = config_of(empty, dict(dense_block_layers=depth)), model.to_dict()
    read["retnet"]["value_dim"] -= 2 * model.width // model.retnet.heads  # 0 there: twice the width over the heads
    for name, fields in read.items():
        assert fields == ours[name] if not isinstance(fields, dict) else fields.items() <= ours[name].items(), name


@pytest.mark.parametrize("preset, millions", [("200m", 200), ("1.3b", 1300), ("2.7b", 2700), ("6.7b", 6700)])
def test_retnet_has_about_the_papers_parameters(preset, millions):
    """12 D^2 a layer (section 3.1), and the embedding."""
    model = retnet.get_config(preset).model
    matrices = 12 * model.width**2 * model.repeats
    assert 0 < count(build(model, 50_280)) - matrices - 50_280 * model.width < 1e-3 * matrices
    assert abs(matrices + 50_280 * model.width * (millions > 1000) - 1e6 * millions) < 0.03 * 1e6 * millions
