"""Files of RetNet in the layouts of its authors (torchscale) and of flash-linear-attention (fla), and their equations.

Neither is installed here. The equations are written in torch, in float64, from torchscale's multiscale_retention.py,
retnet.py and gate_linear_unit.py, and from fla's ops/retention/naive.py, modules/rotary.py, modules/mlp.py and
layers/multiscale_retention.py; so are the fields of their configs and the defaults.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.configs.base import base
from seqmodels.errors import UserError
from seqmodels.fields.mlp import MLP
from seqmodels.fields.retnet import RETNET
from seqmodels.interop import retnet, torchscale
from seqmodels.interop.huggingface import from_huggingface, to_huggingface
from seqmodels.interop.table import Honoured
from seqmodels.model import build

torch = pytest.importorskip("torch")

V, D, H, LAYERS, LENGTH = 13, 12, 2, 2, 9
TOKENS = np.random.default_rng(0).integers(0, V, (2, LENGTH))
TOLERANCE = 1e-5

TORCHSCALE = dict(
    decoder_embed_dim=D, decoder_value_embed_dim=16, decoder_retention_heads=H, decoder_ffn_embed_dim=10,
    decoder_layers=LAYERS, layernorm_eps=1e-3, vocab_size=-1,
)  # fmt: skip
FLA = dict(
    model_type="retnet", hidden_size=D, num_hidden_layers=LAYERS, num_heads=H, intermediate_size=10, vocab_size=V,
    norm_eps=1e-3,
)  # fmt: skip
MODELS = {
    "torchscale": TORCHSCALE,
    "torchscale, other fields": TORCHSCALE
    | dict(activation_fn="swish", layernorm_embedding=True, no_scale_embedding=False)
    | dict(share_decoder_input_output_embed=True),
    "fla": FLA,
    "fla, other fields": FLA
    | dict(expand_k=2.0, expand_v=1.0, intermediate_size=None, elementwise_affine=False, tie_word_embeddings=True),
}


def is_fla(config):
    return "model_type" in config


def shapes_of(config):
    """Shape of each tensor of their files by its name."""
    if is_fla(config):
        keys, values = int(D * config.get("expand_k", 1.0)), int(D * config.get("expand_v", 2.0))
        F = config["intermediate_size"] or 256  # 2 of the width times 2 / 3, rounded up to a multiple of 256
        shapes = {"model.embeddings": (V, D), "model.norm": (D,), "lm_head": (V, D)}
        layer = {"attn.q_proj": (keys, D), "attn.k_proj": (keys, D), "attn.v_proj": (values, D)}
        layer |= {"attn.g_proj": (values, D), "attn.o_proj": (D, values), "attn_norm": (D,), "mlp_norm": (D,)}
        layer |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
        layer |= {"attn.g_norm_swish_gate": (values // H,)} if config.get("elementwise_affine", True) else {}
        prefix, tied = "model.layers", config.get("tie_word_embeddings")
    else:
        values, F = config["decoder_value_embed_dim"], config["decoder_ffn_embed_dim"]
        shapes = {"embed_tokens": (V, D), "layer_norm": (D,), "output_projection": (V, D)}
        shapes |= {"layernorm_embedding": (D,)} if config.get("layernorm_embedding") else {}
        layer = {f"retention.{name}_proj": (D, D) for name in "qk"}
        layer |= {f"retention.{name}_proj": (values, D) for name in "vg"} | {"retention.out_proj": (D, values)}
        layer |= {"retention_layer_norm": (D,), "final_layer_norm": (D,)}
        layer |= {"ffn.fc1": (F, D), "ffn.gate": (F, D), "ffn.fc2": (D, F)}
        prefix, tied = "layers", config.get("share_decoder_input_output_embed")
    if tied:
        del shapes["lm_head" if is_fla(config) else "output_projection"]
    shapes |= {f"{prefix}.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def file_of(config):
    """Drawn tensors of a file."""
    random = np.random.default_rng(3)

    def draw(name, shape):
        return (random.normal(size=shape) * (0.4 if len(shape) > 1 else 0.2) + (len(shape) == 1)).astype(np.float32)

    return {name: draw(name, shape) for name, shape in shapes_of(config).items()}


def rms(x, eps, weight=None):
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def in_heads(x):
    """[B, T, H d] to [B, H, T, d]."""
    return x.reshape(*x.shape[:2], H, -1).transpose(1, 2)


def torchscale_logits(w, config):
    """Their recurrent form (RetNetDecoder with an incremental state)."""
    eps = config["layernorm_eps"]
    activation = dict(gelu=torch.nn.functional.gelu, swish=torch.nn.functional.silu)[
        config.get("activation_fn", "gelu")
    ]
    angle = (1.0 / 10000 ** torch.linspace(0, 1, D // H // 2, dtype=torch.float64)).repeat_interleave(2)
    decay = 1 - 2 ** (-5 - torch.arange(H, dtype=torch.float64))
    index = torch.arange(LENGTH, dtype=torch.float64)[:, None] * angle

    def shifted(x):
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * index.cos() + turned * index.sin()

    x = w["embed_tokens.weight"][torch.from_numpy(TOKENS)]
    x = x if config.get("no_scale_embedding", True) else x * D**0.5
    x = rms(x, eps, w["layernorm_embedding.weight"]) if config.get("layernorm_embedding") else x
    for i in range(LAYERS):
        p = {name.removeprefix(f"layers.{i}."): t for name, t in w.items() if name.startswith(f"layers.{i}.")}
        u = rms(x, eps, p["retention_layer_norm.weight"])
        q, k, v, g = (u @ p[f"retention.{name}_proj.weight"].T for name in "qkvg")
        qr, kr, v = shifted(in_heads(q)), shifted(in_heads(k * (D // H) ** -0.5)), in_heads(v)
        kv, scale, out = None, torch.ones(H, dtype=torch.float64), []
        for t in range(LENGTH):
            new = kr[:, :, t, :, None] * v[:, :, t, None]
            if kv is None:
                kv = new
            else:
                before, scale = scale, scale * decay + 1
                keep = (before.sqrt() * decay / scale.sqrt()).view(H, 1, 1)
                kv = kv * keep + new / scale.sqrt().view(H, 1, 1)
            out.append((qr[:, :, t, :, None] * kv).sum(2))
        o = rms(torch.stack(out, 1), eps).flatten(2)
        x = x + (torch.nn.functional.silu(g) * o) @ p["retention.out_proj.weight"].T
        u = rms(x, eps, p["final_layer_norm.weight"])
        x = x + (activation(u @ p["ffn.fc1.weight"].T) * (u @ p["ffn.gate.weight"].T)) @ p["ffn.fc2.weight"].T
    return rms(x, eps, w["layer_norm.weight"]) @ w.get("output_projection.weight", w["embed_tokens.weight"]).T


def fla_logits(w, config):
    """Their parallel form (naive_retention)."""
    eps, silu = config["norm_eps"], torch.nn.functional.silu
    keys = int(D * config.get("expand_k", 1.0)) // H
    angle = torch.arange(LENGTH, dtype=torch.float64)[:, None] * 10000.0 ** (
        -torch.arange(0, keys, 2, dtype=torch.float64) / keys
    )
    s = (1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))).log2().view(-1, 1, 1)
    n = torch.arange(LENGTH, dtype=torch.float64)
    n = torch.exp2((n[:, None] - n) * s) * n[:, None].ge(n)

    def rotary(x):
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    x = w["model.embeddings.weight"][torch.from_numpy(TOKENS)]
    for i in range(LAYERS):
        prefix = f"model.layers.{i}."
        p = {name.removeprefix(prefix): t for name, t in w.items() if name.startswith(prefix)}
        u = rms(x, eps, p["attn_norm.weight"])
        q, k, v, g = (in_heads(u @ p[f"attn.{name}_proj.weight"].T) for name in "qkvg")
        scores = torch.einsum("bhqd,bhkd,hqk->bhqk", rotary(q) * keys**-0.5, rotary(k), n)
        o = rms(torch.einsum("bhqk,bhkd->bhqd", scores, v), eps, p.get("attn.g_norm_swish_gate.weight")) * silu(g)
        x = x + o.transpose(1, 2).flatten(2) @ p["attn.o_proj.weight"].T
        u = rms(x, eps, p["mlp_norm.weight"])
        x = x + (silu(u @ p["mlp.gate_proj.weight"].T) * (u @ p["mlp.up_proj.weight"].T)) @ p["mlp.down_proj.weight"].T
    return rms(x, eps, w["model.norm.weight"]) @ w.get("lm_head.weight", w["model.embeddings.weight"]).T


@functools.cache
def imported(name):
    """Our model and its parameters."""
    fields, params = from_huggingface(file_of(MODELS[name]), MODELS[name])
    config = base().model
    config.update(fields)
    return build(config, V), params


def logits(model, params, tokens, state=None):
    hidden, state = model.apply({"params": params}, jnp.asarray(tokens, jnp.int32), state=state)
    return model.apply({"params": params}, hidden, method="logits"), state


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_logits_gradients_and_decoding(name):
    config = MODELS[name]
    tensors = {n: torch.from_numpy(t).double().requires_grad_() for n, t in file_of(config).items()}
    want = (fla_logits if is_fla(config) else torchscale_logits)(tensors, config)
    weights = np.random.default_rng(1).normal(size=want.shape)
    (want * torch.from_numpy(weights)).sum().backward()
    want = want.detach().numpy()
    assert 0.5 < want.std() < 10
    model, params = imported(name)
    declared = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, declared)

    def near(got, want):
        assert np.abs(got - want).max() < TOLERANCE * want.std()

    @jax.jit
    def run(params):
        got, pull = jax.vjp(lambda params: logits(model, params, TOKENS)[0], params)
        return got, *pull(jnp.asarray(weights, jnp.float32))

    got, gradients = run(params)
    near(got, want)
    theirs = from_huggingface({n: t.grad.numpy() for n, t in tensors.items()}, config)[1]
    for (path, x), expected in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(theirs), strict=True):
        error = np.linalg.norm(x - expected) / np.linalg.norm(expected)
        assert error < TOLERANCE, f"{jax.tree_util.keystr(path)}: {error:.2e} of the norm"

    step, state = jax.jit(lambda tokens, state: logits(model, params, tokens, state)), model.init_state(2)
    for start, stop in [(0, 5), *((t, t + 1) for t in range(5, LENGTH))]:
        got, state = step(TOKENS[:, start:stop], state)
        near(got, want[:, start:stop])


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("fla")])
def test_what_fla_can_read_is_exported(name):
    """Bit for bit, and with a config from which comes what was exported."""
    tensors, (model, params) = file_of(MODELS[name]), imported(name)
    again, config = to_huggingface(params, model.config)
    assert again.keys() == tensors.keys()
    for tensor in tensors:
        np.testing.assert_array_equal(again[tensor], tensors[tensor], tensor)
    fields = from_huggingface(again, config)[0]
    assert fields == from_huggingface(tensors, MODELS[name])[0]
    unfused = {n.replace("g_norm_swish_gate", "g_norm"): t for n, t in tensors.items()}
    assert from_huggingface(unfused, config | dict(fuse_norm=False))[0] == fields


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(retnet=dict(angles="retnet")), r"retnet.angles is 'retnet'; only 'rope'"),
        (dict(retnet=dict(schedule="spread")), r"retnet.schedule is 'spread'"),
        (dict(retnet=dict(row_scale=True)), r"retnet.row_scale is True"),
        (dict(retnet=dict(activation="silu")), r"retnet.activation is 'silu'"),
        (dict(retnet=dict(norm_eps=0.5)), r"retnet.norm_eps is 0.5; only model.norm_eps, 0.001"),
        (dict(mlp=dict(gated=False)), r"mlp.gated is False"),
        (dict(mlp=dict(activation="gelu")), r"mlp.activation is 'gelu'"),
        (dict(embedding_norm=True), r"embedding_norm is True"),
        (dict(embedding_scale=2.0), r"embedding_scale is 2.0"),
        (dict(bias=True), r"bias is True"),
        (dict(norm="layer"), r"norm is 'layer'"),
    ],
    ids=str,
)
def test_what_fla_cannot_read_is_named(change, message):
    model, params = imported("fla")
    config = model.config.to_dict()
    for name, value in change.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message):
        to_huggingface(params, config)


def test_every_field_of_ours_is_decided():
    assert RETNET.fields.keys() == retnet.EXPORTED_RETNET.keys()
    assert MLP.fields.keys() == retnet.EXPORTED_MLP.keys()


# Fields of theirs, with the defaults of their classes
FLA_FIELDS = dict(
    attn_mode="chunk", hidden_size=2048, expand_k=1.0, expand_v=2.0, hidden_ratio=2, intermediate_size=None,
    num_hidden_layers=24, num_heads=8, num_kv_heads=None, feature_map=None, hidden_act="swish", use_short_conv=False,
    conv_size=4, use_output_gate=True, max_position_embeddings=2048, elementwise_affine=True, norm_eps=1e-6, attn=None,
    use_cache=True, pad_token_id=None, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    initializer_range=0.02, fuse_norm=True, fuse_swiglu=True, fuse_cross_entropy=True,
    fuse_linear_cross_entropy=False, use_l2warp=False, vocab_size=32000, attnres_block_size=None,
)  # fmt: skip
TORCHSCALE_FIELDS = dict(
    decoder_embed_dim=768, decoder_value_embed_dim=1280, decoder_retention_heads=3, decoder_ffn_embed_dim=1280,
    decoder_layers=12, decoder_normalize_before=True, activation_fn="gelu", dropout=0.0, drop_path_rate=0.0,
    activation_dropout=0.0, no_scale_embedding=True, layernorm_embedding=False, moe_freq=0, moe_top1_expert=False,
    moe_expert_count=0, moe_gating_use_fp32=True, moe_eval_capacity_token_fraction=0.25,
    moe_second_expert_policy="random", moe_normalize_gate_prob_before_dropping=False, use_xmoe=False,
    rel_pos_buckets=0, max_rel_pos=0, deepnorm=False, subln=True, multiway=False,
    share_decoder_input_output_embed=False, max_target_positions=1024, no_output_layer=False, layernorm_eps=1e-6,
    chunkwise_recurrent=False, recurrent_chunk_size=512, vocab_size=-1, checkpoint_activations=False, fsdp=False,
    ddp_rank=0, xpos_rel_pos=False, xpos_scale_base=512,
)  # fmt: skip


@pytest.mark.parametrize("fields, table", [(FLA_FIELDS, retnet.RETNET), (TORCHSCALE_FIELDS, torchscale.TABLE)])
def test_every_field_of_theirs_is_decided(fields, table):
    assert not fields.keys() - table.keys()
    for name, default in fields.items():
        if isinstance(table[name], Honoured):
            assert table[name].default == default, name
        if hasattr(table[name], "values"):
            assert default in table[name].values, name


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("fla", dict(num_heads=5), "expand_k is 1.0; hidden_size times it is 12; allowed: a multiple of num_heads=5"),
        ("fla", dict(expand_k=0.5), "expand_k is 0.5; a head has 3 channels of keys; allowed: an even number"),
        ("fla", dict(expand_v=0.0), "expand_v is 0.0; allowed: a number greater than 0"),
        ("fla", dict(num_kv_heads=1), "num_kv_heads is 1; only None"),
        ("fla", dict(feature_map="relu"), "feature_map is 'relu'"),
        ("fla", dict(hidden_act="powlu"), "hidden_act is 'powlu'"),
        ("fla", dict(use_short_conv=True), "use_short_conv is True"),
        ("fla", dict(use_output_gate=False), "use_output_gate is False"),
        ("fla", dict(attn=dict(layers=[1])), "attn is {'layers'"),
        ("fla", dict(attnres_block_size=2), "attnres_block_size is 2"),
        ("fla", dict(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
        ("fla", dict(new=3), "new is 3; the import does not know this field"),
        ("torchscale", dict(decoder_normalize_before=False), "decoder_normalize_before is False"),
        ("torchscale", dict(deepnorm=True), "deepnorm is True"),
        ("torchscale", dict(moe_freq=2), "moe_freq is 2"),
        ("torchscale", dict(multiway=True), "multiway is True"),
        ("torchscale", dict(no_output_layer=True), "no_output_layer is True"),
        ("torchscale", dict(activation_fn="tanh"), "activation_fn is 'tanh'"),
        ("torchscale", dict(decoder_retention_heads=5), "decoder_embed_dim is 12; allowed: a multiple of 2 decoder_re"),
        ("torchscale", dict(decoder_value_embed_dim=15), "decoder_value_embed_dim is 15; allowed: a multiple of deco"),
        ("torchscale", dict(decoder_layers=10**9), "the config asks for 1000000000 layers"),
        ("torchscale", dict(decoder_layers=3), "missing layers.2"),
        ("torchscale", dict(new=3), "new is 3; the import does not know this field"),
    ],
    ids=str,
)
def test_what_is_refused(name, change, message):
    with pytest.raises(UserError, match=message):
        from_huggingface(file_of(MODELS[name]), MODELS[name] | change)


def test_files_of_fairseq_and_of_a_model_with_its_buffers():
    tensors = file_of(TORCHSCALE)
    whole = {f"decoder.{name}": tensor for name, tensor in tensors.items()}
    whole |= {f"decoder.retnet_rel_pos.{name}": np.zeros(2, np.float32) for name in ("angle", "decay")}
    got, want = (from_huggingface(each, TORCHSCALE)[1] for each in (whole, tensors))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    with pytest.raises(UserError, match=r"unexpected layers\.0\.retention\.new"):
        from_huggingface(tensors | {"layers.0.retention.new": np.zeros(2, np.float32)}, TORCHSCALE)
