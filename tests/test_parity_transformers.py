"""Models of transformers without experts against ours: logits, gradients, decoding, files. RWKV-4 is in test_rwkv.py.

Parameters are perturbed until the logits' standard deviation is 1 to 3: with the initial ones every defect hides
below 1e-4. Theirs run in float64 as far as they can, so the rounding is ours: float32 sums through two layers of
width 32. Measured: logits differ by 5e-6 of their standard deviation at most, gradients by 4e-6 of their norm.
"""

import copy
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.configs import mamba, mamba2, pythia, transformer
from seqmodels.errors import UserError
from seqmodels.interop.huggingface import from_huggingface, to_huggingface
from seqmodels.interop.pretrained import load, save
from seqmodels.interop.stacking import stack, unstack
from seqmodels.model import build
from tests.parity import arrays, logits, ours_of

pytestmark = pytest.mark.slow

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BATCH, LENGTH, PREFILL, VOCABULARY = 2, 21, 7, 37
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH))
TOLERANCE = 1e-5

SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
LLAMA = dict(**SIZES, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
DEFAULT = dict(rope_type="default")
NEOX = dict(**SIZES, num_attention_heads=4, intermediate_size=48, layer_norm_eps=1e-3)
MODELS = {
    "mamba": ("Mamba", dict(**SIZES, state_size=8)),
    "untied falcon mamba": (
        "FalconMamba",
        dict(**SIZES, state_size=5, conv_kernel=3, time_step_rank=3, mixer_rms_eps=1e-3, tie_word_embeddings=False),
    ),
    "mamba2": ("Mamba2", dict(**SIZES, num_heads=8, head_dim=8, state_size=6, n_groups=2, chunk_size=4)),
    "llama": ("Llama", dict(**LLAMA, head_dim=12, rope_theta=500.0, rms_norm_eps=1e-2)),
    "llama 3.1": (
        "Llama",
        dict(**LLAMA, max_position_embeddings=8 * 8192, rope_parameters=dict(rope_theta=5e4, **LLAMA3)),
    ),
    "gpt neox": ("GPTNeoX", dict(**NEOX, rope_parameters=dict(rope_theta=500.0, partial_rotary_factor=0.5, **DEFAULT))),
    "sequential gpt neox": ("GPTNeoX", dict(**NEOX, use_parallel_residual=False, tie_word_embeddings=True)),
    "recurrent gemma": (
        "RecurrentGemma",
        dict(
            SIZES,
            **dict(num_attention_heads=4, num_key_value_heads=1, lru_width=24, intermediate_size=96, conv1d_width=3),
            **dict(attention_window_size=8, block_types=["recurrent", "attention"], logits_soft_cap=4.0),
            **dict(tie_word_embeddings=False, pad_token_id=None, rms_norm_eps=1e-3),
        ),
    ),
    "tied mistral": ("Mistral", dict(**LLAMA, sliding_window=8, head_dim=8, tie_word_embeddings=True)),
}


@pytest.fixture(scope="module", params=MODELS)
def theirs(request):
    """A transformers model with perturbed parameters, float32, on the CPU."""
    family, sizes = MODELS[request.param]
    config = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("A_log"):
                parameter += torch.randn_like(parameter) * (0.25 if parameter.ndim > 1 else 0.1)
    return model


@pytest.fixture(scope="module")
def exact(theirs):
    """The same model in float64."""
    return copy.deepcopy(theirs).double()


@pytest.fixture(scope="module")
def ours(theirs):
    fields, params = from_huggingface(arrays(theirs), theirs.config.to_dict())
    return ours_of(fields), params, fields


def assert_logits(x, want, what=""):
    x, want = np.asarray(x, np.float64), want.numpy()
    assert 0.5 < want.std() < 10  # perturbed enough to show a defect, not so much as to drown it
    error = np.abs(x - want).max() / want.std()
    assert error < TOLERANCE, f"{what}: {error:.2e} of the standard deviation {want.std():.2e}"


def test_logits(exact, ours):
    with torch.no_grad():
        want = exact(torch.from_numpy(TOKENS), use_cache=False).logits
    model, params, _ = ours
    assert_logits(logits(model, params, TOKENS)[0], want)


def test_every_parameter_and_no_other(ours):
    model, params, _ = ours
    declared = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    declared = jax.tree.map(lambda p: p.value.shape, declared, is_leaf=lambda p: hasattr(p, "names"))
    assert jax.tree.map(np.shape, params) == declared


def test_gradients(exact, ours):
    weights = np.random.default_rng(1).normal(size=(BATCH, LENGTH, VOCABULARY))
    exact.zero_grad()
    (exact(torch.from_numpy(TOKENS), use_cache=False).logits * torch.from_numpy(weights)).sum().backward()
    want = from_huggingface(arrays(exact, gradients=True), exact.config.to_dict())[1]
    model, params, _ = ours
    got = jax.jit(jax.grad(lambda p: jnp.sum(logits(model, p, TOKENS)[0] * weights)))(params)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), expected in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        error = np.linalg.norm(x - expected) / np.linalg.norm(expected)
        assert error < TOLERANCE, f"{jax.tree_util.keystr(path)}: {error:.2e} of the norm"


def test_cached_decoding(exact, ours):
    """A prefill and single tokens. Only Mamba-2's prefill is in pieces: their Mamba forgets its state there."""
    model, params, _ = ours
    step = jax.jit(lambda tokens, state: logits(model, params, tokens, state))
    state = model.init_state(BATCH, LENGTH)
    cache, tokens = new_cache(exact), torch.from_numpy(TOKENS)
    prefill = [(0, 3), (3, PREFILL)] if exact.config.model_type == "mamba2" else [(0, PREFILL)]
    for start, stop in [*prefill, *((t, t + 1) for t in range(PREFILL, LENGTH))]:
        got, state = step(TOKENS[:, start:stop].astype(np.int32), state)
        with torch.no_grad():
            cached = {} if cache is None else {name_of_cache(exact): cache}
            out = exact(tokens[:, start:stop], use_cache=True, **cached)
        cache = getattr(out, name_of_cache(exact), cache)
        assert_logits(got, out.logits, f"tokens {start} to {stop}")


def new_cache(model):
    """None, from which a model makes one, except RecurrentGemma: it keeps states in its modules, and returns none."""
    recurrent_gemma = model.config.model_type == "recurrent_gemma"
    return transformers.DynamicCache(config=model.config) if recurrent_gemma else None


def name_of_cache(model):
    return "cache_params" if "mamba" in model.config.model_type else "past_key_values"


def test_file_round_trip(theirs, ours, tmp_path):
    """Their file is read, and ours is read by them, without a change of a single bit."""
    theirs.save_pretrained(tmp_path / "theirs")
    fields, params = load(tmp_path / "theirs")
    jax.tree.map(np.testing.assert_array_equal, params, ours[1])
    assert fields == ours[2]
    save(tmp_path / "ours", params, ours[0].config)
    chunks = {"chunk_size": theirs.config.chunk_size} if theirs.config.model_type == "mamba2" else {}  # rounding
    again = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager", **chunks)
    for (name, x), y in zip(again.state_dict().items(), theirs.state_dict().values(), strict=True):
        np.testing.assert_array_equal(x.numpy(), y.numpy(), name)
    with torch.no_grad():
        tokens = torch.from_numpy(TOKENS)
        np.testing.assert_array_equal(again(tokens).logits.numpy(), theirs(tokens).logits.numpy())


def test_bfloat16_file(theirs, ours, tmp_path):
    half = type(theirs).from_pretrained(
        None, config=theirs.config, state_dict=theirs.state_dict(), dtype=torch.bfloat16
    )
    half.save_pretrained(tmp_path)
    _, params = load(tmp_path)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-8), params, ours[1])


def test_scan_over_layers_takes_the_same_weights(theirs, ours):
    _, params, fields = ours
    stacked = stack(params, size=len(fields["pattern"].split()))
    model = ours_of({**fields, "scan_blocks": 1})
    got, want = logits(model, stacked, TOKENS)[0], logits(ours[0], params, TOKENS)[0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, unstack(stacked), params)


def original_of(model):
    """The tensors and config of a transformers Mamba, as Mamba's authors name them."""
    tensors = {name.replace("embeddings", "embedding"): tensor for name, tensor in arrays(model).items()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    config = model.config
    ssm = dict(d_state=config.state_size, d_conv=config.conv_kernel, dt_rank=config.time_step_rank)
    sizes = dict(d_model=config.hidden_size, n_layer=config.num_hidden_layers, vocab_size=VOCABULARY - 2, ssm_cfg=ssm)
    return tensors, dict(**sizes, rms_norm=True, residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=8)


@pytest.fixture
def tiny_mamba():
    return transformers.MambaForCausalLM(transformers.MambaConfig(**MODELS["mamba"][1]))


def test_files_of_mambas_authors(tiny_mamba):
    fields, params = from_huggingface(*original_of(tiny_mamba))
    want_fields, want = from_huggingface(arrays(tiny_mamba), tiny_mamba.config.to_dict())
    jax.tree.map(np.testing.assert_array_equal, params, want)
    assert fields == want_fields


def test_mamba2_files_of_mambas_authors():
    sizes = {**MODELS["mamba2"][1], "tie_word_embeddings": True}
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes))
    tensors, config = original_of(model)
    config["ssm_cfg"] = dict(layer="Mamba2", d_state=6, headdim=8, ngroups=2)
    fields, params = from_huggingface(tensors, config)
    want_fields, want = from_huggingface(arrays(model), model.config.to_dict())
    jax.tree.map(np.testing.assert_array_equal, params, want)
    assert fields == want_fields
    with pytest.raises(UserError, match="norm_before_gate is True"):
        from_huggingface(tensors, {**config, "ssm_cfg": {**config["ssm_cfg"], "norm_before_gate": True}})
    with pytest.raises(UserError, match="time_step_limit is"):
        from_huggingface(arrays(model), {**model.config.to_dict(), "time_step_limit": (0.0, 0.1)})


# BLOOM, the model with ALiBi. It has no converter: all but its names and embeddings is a sequential GPT-NeoX.

BLOOM = {
    "transformer.h.": "gpt_neox.layers.",
    "self_attention.": "attention.",
    "transformer.ln_f.": "gpt_neox.final_layer_norm.",
    "transformer.word_embeddings.": "gpt_neox.embed_in.",
}


def from_bloom(tensors, config):
    """Fields and parameters of ours."""
    behind = {x: tensors[f"transformer.word_embeddings_layernorm.{x}"] for x in ("weight", "bias")}
    tensors = {name: x for name, x in tensors.items() if "embeddings_layernorm" not in name}
    for theirs, neox in BLOOM.items():
        tensors = {name.replace(theirs, neox): x for name, x in tensors.items()}
    sizes = dict(num_attention_heads=config.n_head, intermediate_size=4 * config.hidden_size, hidden_act="gelu_new")
    sizes |= {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    sizes |= dict(layer_norm_eps=config.layer_norm_epsilon, use_parallel_residual=False, tie_word_embeddings=True)
    fields, params = from_huggingface(tensors, transformers.GPTNeoXConfig(**sizes).to_dict())
    fields["attention"]["positions"], fields["embedding_norm"] = "alibi", True
    return fields, params | {"embedding_norm": dict(scale=behind["weight"], bias=behind["bias"])}


def test_bloom():
    """Logits, gradients and cached decoding; six heads, of which the last two have slopes between the others.

    A bias of the keys adds the same number to all scores of a query, so its gradient is zero but for rounding.
    """
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=2, n_head=6, use_cache=False)
    torch.manual_seed(0)
    bloom = transformers.BloomForCausalLM._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in bloom.parameters():
            parameter += torch.randn_like(parameter) * (0.25 if parameter.ndim > 1 else 0.1)
    fields, params = from_bloom(arrays(bloom), config)
    model, bloom = ours_of(fields), bloom.double()
    tokens = torch.from_numpy(TOKENS)
    weights = np.random.default_rng(1).normal(size=(BATCH, LENGTH, VOCABULARY))

    want = bloom(tokens).logits
    (want * torch.from_numpy(weights)).sum().backward()

    def loss(params):
        out = logits(model, params, TOKENS)[0]
        return jnp.sum(out * weights), out

    gradients, got = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert_logits(got, want.detach())
    wanted = from_bloom(arrays(bloom, gradients=True), config)[1]
    assert jax.tree.structure(gradients) == jax.tree.structure(wanted)
    for (path, x), expected in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(wanted), strict=True):
        scale = expected if path[-1].key != "key_bias" else wanted[path[0].key]["mixer"]["query_bias"]
        error = np.linalg.norm(x - expected) / np.linalg.norm(scale)
        assert error < TOLERANCE, f"{jax.tree_util.keystr(path)}: {error:.2e} of the norm"

    step = jax.jit(lambda tokens, state: logits(model, params, tokens, state))
    state, cache = model.init_state(BATCH, LENGTH), transformers.DynamicCache(config=config)
    for start, stop in [(0, PREFILL), *((t, t + 1) for t in range(PREFILL, LENGTH))]:
        got, state = step(TOKENS[:, start:stop].astype(np.int32), state)
        with torch.no_grad():
            out = bloom(tokens[:, start:stop], use_cache=True, past_key_values=cache)
        assert_logits(got, out.logits, f"tokens {start} to {stop}")


PRESETS = [(mamba, "Mamba"), (mamba2, "Mamba2"), (transformer, "Llama"), (pythia, "GPTNeoX")]


@pytest.mark.slow
@pytest.mark.parametrize("preset, family", PRESETS)
def test_presets_export(preset, family, tmp_path):
    """A model that was never theirs, its sizes left to our defaults."""
    config = preset.get_config().model
    config.update(dict(width=32, repeats=2))
    if family == "Llama":
        config.mlp.hidden = 0
    model = build(config, VOCABULARY)
    params = nn.meta.unbox(model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]
    save(tmp_path, params, model.config)
    theirs = getattr(transformers, f"{family}ForCausalLM").from_pretrained(tmp_path).double()
    with torch.no_grad():
        want = theirs(torch.from_numpy(TOKENS), use_cache=False).logits.numpy()
    np.testing.assert_allclose(logits(model, params, TOKENS)[0], want, atol=1e-5 * want.std())


def test_what_does_not_fit_is_named(tiny_mamba):
    tensors, config = arrays(tiny_mamba), tiny_mamba.config.to_dict()
    name = "backbone.layers.1.mixer.D"
    with pytest.raises(UserError, match=f"missing {name}$"):
        from_huggingface({k: v for k, v in tensors.items() if k != name}, config)
    with pytest.raises(UserError, match=r"unexpected backbone.layers.0.mixer.dt_layernorm.weight$"):
        from_huggingface({**tensors, "backbone.layers.0.mixer.dt_layernorm.weight": tensors[name]}, config)
    with pytest.raises(UserError, match=rf"{name} has shape \(63,\); the config asks for \(64,\)"):
        from_huggingface({**tensors, name: tensors[name][1:]}, config)
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        from_huggingface({**tensors, "lm_head.weight": tensors["backbone.embeddings.weight"] + 1}, config)
    with pytest.raises(UserError, match="hidden_act is 'relu'; only 'silu'"):
        from_huggingface(tensors, {**config, "hidden_act": "relu"})
    with pytest.raises(UserError, match="model_type is 'gpt2'; allowed: mamba"):
        from_huggingface(tensors, {**config, "model_type": "gpt2"})
    with pytest.raises(UserError, match="field 'state_size' of a mamba model is missing"):
        from_huggingface(tensors, {k: v for k, v in config.items() if k != "state_size"})
    with pytest.raises(UserError, match="no embedding"):
        from_huggingface({}, config)


def test_what_transformers_lacks_is_named(tiny_mamba, tmp_path):
    fields, params = from_huggingface(arrays(tiny_mamba), tiny_mamba.config.to_dict())
    model = ours_of(fields).config.to_dict()
    with pytest.raises(UserError, match="norms is 'learned'"):
        to_huggingface(params, {**model, "mamba": {**model["mamba"], "norms": "learned"}})
    with pytest.raises(UserError, match="variant is 'read'"):
        to_huggingface(params, {**model, "dense": {**model["dense"], "variant": "read"}})
    with pytest.raises(UserError, match=r"pattern is 'mamba\|mlp'"):
        to_huggingface(params, {**model, "pattern": "mamba|mlp"})
    with pytest.raises(UserError, match="block_0 is missing"):
        to_huggingface(stack(params, size=1), model)
    with pytest.raises(UserError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"neither \*\.safetensors"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)
