"""Configs like those of published models are read and not refused.

That of falcon-mamba-7b is quoted by public code; the others were written down from memory.
"""

import pytest

from seqmodels.interop import original
from seqmodels.interop.huggingface import FAMILIES, plain
from seqmodels.interop.table import read

STEPS = dict(
    time_step_floor=1e-4, time_step_init_scheme="random", time_step_max=0.1, time_step_min=1e-3, time_step_scale=1.0
)
SHARED_BY_MAMBAS = dict(
    bos_token_id=0,
    conv_kernel=4,
    hidden_act="silu",
    initializer_range=0.1,
    layer_norm_epsilon=1e-5,
    rescale_prenorm_residual=False,
    residual_in_fp32=True,
    use_bias=False,
    use_cache=True,
    use_conv_bias=True,
    **STEPS,
)
SHARED_BY_LLAMAS = dict(
    bos_token_id=1,
    eos_token_id=2,
    hidden_act="silu",
    initializer_range=0.02,
    num_attention_heads=32,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    use_cache=True,
)
PUBLISHED = {
    "falcon-mamba-7b": (
        dict(
            **SHARED_BY_MAMBAS,
            _name_or_path="./",
            architectures=["FalconMambaForCausalLM"],
            eos_token_id=11,
            expand=16,
            hidden_size=4096,
            intermediate_size=8192,
            model_type="falcon_mamba",
            num_hidden_layers=64,
            pad_token_id=11,
            state_size=16,
            tie_word_embeddings=False,
            time_step_rank=256,
            torch_dtype="bfloat16",
            transformers_version="4.43.0.dev0",
            vocab_size=65024,
        ),
        {"width": 4096, "mamba.expand": 2, "mamba.norms": "rms", "mamba.norm_eps": 1e-6, "tie_embeddings": False},
    ),
    "mamba-130m-hf": (
        dict(
            **SHARED_BY_MAMBAS,
            architectures=["MambaForCausalLM"],
            d_inner=1536,
            d_model=768,
            eos_token_id=0,
            expand=2,
            fused_add_norm=True,
            hidden_size=768,
            intermediate_size=1536,
            model_type="mamba",
            n_layer=24,
            num_hidden_layers=24,
            pad_token_id=0,
            pad_vocab_size_multiple=8,
            rms_norm=True,
            ssm_cfg={},
            state_size=16,
            time_step_rank=48,
            torch_dtype="float32",
            transformers_version="4.39.0.dev0",
            vocab_size=50280,
        ),
        {"width": 768, "repeats": 24, "mamba.dt_rank": 48, "mamba.expand": 2, "tie_embeddings": True},
    ),
    "Mamba-Codestral-7B": (
        dict(
            **SHARED_BY_MAMBAS,
            architectures=["Mamba2ForCausalLM"],
            chunk_size=256,
            eos_token_id=2,
            expand=2,
            head_dim=64,
            hidden_size=4096,
            model_type="mamba2",
            n_groups=8,
            norm_before_gate=True,
            num_heads=128,
            num_hidden_layers=64,
            pad_token_id=0,
            rms_norm=True,
            state_size=128,
            tie_word_embeddings=False,
            time_step_limit=[0.0, {"__float__": "Infinity"}],
            time_step_rank=256,
            torch_dtype="bfloat16",
            vocab_size=32768,
        ),
        {"width": 4096, "mamba2.groups": 8, "mamba2.head_dim": 64, "mamba2.state": 128},
    ),
    "Llama-2-7b": (
        dict(
            **SHARED_BY_LLAMAS,
            architectures=["LlamaForCausalLM"],
            hidden_size=4096,
            intermediate_size=11008,
            max_position_embeddings=4096,
            model_type="llama",
            num_hidden_layers=32,
            num_key_value_heads=32,
            pretraining_tp=1,
            rms_norm_eps=1e-5,
            rope_scaling=None,
            transformers_version="4.31.0.dev0",
            vocab_size=32000,
        ),
        {"attention.heads": 32, "attention.kv_heads": 32, "attention.head_dim": 128, "attention.rope_theta": 1e4},
    ),
    "an early Llama": (
        dict(
            **SHARED_BY_LLAMAS,
            architectures=["LlamaForCausalLM"],
            hidden_size=4096,
            intermediate_size=11008,
            max_sequence_length=2048,
            model_type="llama",
            num_hidden_layers=32,
            pad_token_id=0,
            rms_norm_eps=1e-6,
            transformers_version="4.28.1",
            vocab_size=32000,
        ),
        {"attention.kv_heads": 32, "norm_eps": 1e-6, "attention.window": 0},
    ),
    "Mistral-7B-v0.1": (
        dict(
            **SHARED_BY_LLAMAS,
            architectures=["MistralForCausalLM"],
            hidden_size=4096,
            intermediate_size=14336,
            max_position_embeddings=32768,
            model_type="mistral",
            num_hidden_layers=32,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            sliding_window=4096,
            transformers_version="4.34.0.dev0",
            vocab_size=32000,
        ),
        {"attention.kv_heads": 8, "attention.window": 4096},
    ),
    "mamba2-130m": (
        dict(
            d_model=768,
            d_intermediate=0,
            n_layer=24,
            vocab_size=50277,
            ssm_cfg={"layer": "Mamba2"},
            attn_layer_idx=[],
            attn_cfg={},
            rms_norm=True,
            residual_in_fp32=True,
            fused_add_norm=True,
            pad_vocab_size_multiple=16,
            tie_embeddings=True,
        ),
        {"width": 768, "mamba2.state": 128, "mamba2.head_dim": 64, "mamba2.groups": 1, "vocab_size": 50288},
    ),
}


@pytest.mark.parametrize("config, want", PUBLISHED.values(), ids=PUBLISHED)
def test_published_configs_are_read(config, want):
    if "model_type" in config:
        family = FAMILIES[config["model_type"]]
        fields = family.config_of(read(plain(config), family.table, config["model_type"]))
    else:
        fields = original.config_of(config, 50288)
    for place, value in want.items():
        group, _, name = place.rpartition(".")
        assert (fields[group] if group else fields)[name] == value, place
