"""Every field of every family's config, changed one at a time: transformers is the oracle.

A change is either converted (the logits of both sides agree) or refused by a line that names the field. The fields are
those of transformers' own classes and those of our tables, so a new field of theirs fails here until a table has it.
"""

import dataclasses
import functools
import json
import os
import re

import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.configs.base import base
from seqmodels.errors import UserError
from seqmodels.interop.generic import COMMON
from seqmodels.interop.huggingface import FAMILIES, from_huggingface
from seqmodels.interop.table import Harmless, Honoured, Only
from seqmodels.model import build

pytestmark = pytest.mark.slow

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH = 19, 11
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (1, LENGTH))
TOLERANCE = 1e-4  # of the standard deviation of the logits

SIZES = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=24)
TINY = {
    "mamba": dict(SIZES, state_size=4),
    "falcon_mamba": dict(SIZES, state_size=4),
    "mamba2": dict(SIZES, state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=4),
    "llama": dict(SIZES, **HEADS),
    "mistral": dict(SIZES, **HEADS, sliding_window=6),
    "mixtral": dict(SIZES, **HEADS, num_local_experts=3, num_experts_per_tok=2),
    "gpt_neox": dict(SIZES, num_attention_heads=4, intermediate_size=24, rotary_pct=1.0),
    "recurrent_gemma": dict(
        SIZES | {"num_hidden_layers": 2}, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48,
        lru_width=24, attention_window_size=6, block_types=["recurrent", "attention"], logits_soft_cap=4.0,
    ),
    "olmo_hybrid": dict(
        SIZES | {"num_hidden_layers": 2}, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=6, linear_value_head_dim=5, pad_token_id=None,
    ),
    "qwen3_next": dict(
        SIZES | {"num_hidden_layers": 2}, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        head_dim=16, full_attention_interval=2, mlp_only_layers=[0], num_experts=3, num_experts_per_tok=2,
        moe_intermediate_size=8, shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=6, linear_value_head_dim=5,
    ),
    "rwkv": dict(SIZES | {"num_hidden_layers": 2}, attention_hidden_size=24, intermediate_size=32),  # 1: theirs fails
    "jamba": dict(
        SIZES | HEADS | {"num_hidden_layers": 2}, attn_layer_period=2, attn_layer_offset=0, expert_layer_period=2,
        expert_layer_offset=0, num_experts=3, num_experts_per_tok=2, mamba_d_state=4,
    ),
}  # fmt: skip
CLASSES = dict(mamba="Mamba", falcon_mamba="FalconMamba", mamba2="Mamba2", llama="Llama", mistral="Mistral")
CLASSES |= dict(mixtral="Mixtral", jamba="Jamba", gpt_neox="GPTNeoX", rwkv="Rwkv", recurrent_gemma="RecurrentGemma")
CLASSES |= dict(qwen3_next="Qwen3Next", olmo_hybrid="OlmoHybrid")
WIDE = ("qwen3_next", "olmo_hybrid")  # with sizes too large for a test where they are missing
FIRST = ("mamba", "falcon_mamba", "mamba2", "llama", "mistral")  # the others skip the fields that all families have

TOO_LARGE = ("hidden_size", "num_hidden_layers")  # by default
SCALES = re.compile(r"(norm|norm_f|ln|ln1|ln2|ln_out)\.weight$|\.D$")  # which are about 1
MISSING = object()  # the change that a field is not there

# Other values of the fields for which `other` knows none, or not all that matter
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
DEFAULT_ROTARY = dict(rope_type="default", rope_theta=100.0)
CHANGED = {
    "attention_chunk_size": [4],
    "attention_window_size": [3, 1, 0],
    "attention_hidden_size": [32, None],
    "attn_layer_offset": [1, 2],
    "attn_layer_period": [1, 3],
    "attn_implementation": ["sdpa"],
    "_attn_implementation": ["sdpa"],
    "auto_map": [{"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}],
    "block_types": [["attention", "recurrent"], ["recurrent"], ["recurrent", "mlp"], [], None],
    "conv1d_width": [3, 9, 1],
    "conv_kernel": [3, 9, 1],
    "decoder_sparse_step": [2, 0],
    "dtype": ["bfloat16", "float32"],
    "expand": [1, 0, 1.5, "2"],
    "expert_layer_offset": [1, 2],
    "expert_layer_period": [1, 3],
    "experts_implementation": ["eager"],
    "final_w_init_variance_scale": [0.5],
    "fusion_config": [{"rms_norm": True}],
    "full_attention_interval": [1, 3, 0],
    "head_dim": [6, 5, 0],
    "hidden_act": ["swish", "gelu", "relu", "gelu_new", "gelu_pytorch_tanh", "tanh", None],
    "hidden_size": [24, 0],
    "id2label": [{"0": "a", "1": "b", "2": "c"}],
    "intermediate_size": [32, 40, None],
    "is_causal": [False, None],
    "label2id": [{"a": 0, "b": 1}],
    "layer_norm_epsilon": [0.1, 0.0, float("nan")],
    "layer_types": [["full_attention"], ["sliding_attention"], ["full_attention", "linear_attention"]],
    "linear_conv_kernel_dim": [3, 9],
    "linear_key_head_dim": [4],
    "linear_num_key_heads": [4, 3],
    "linear_num_value_heads": [2, 3],
    "linear_value_head_dim": [6],
    "mixer_rms_eps": [0.1],
    "n_groups": [2, 3],
    "num_attention_heads": [2, 8, 3],
    "num_experts": [1, 4, 0],
    "num_experts_per_tok": [1, 3, 4],
    "num_hidden_layers": [2, 0, 4],
    "num_key_value_heads": [1, 4, 3, None],
    "mamba_d_conv": [3, 9, 1],
    "mamba_dt_rank": [3, "auto", 0],
    "mamba_expand": [1, 3, 0],
    "logits_soft_cap": [1.0, 0.0],
    "lru_width": [32, 25, None],
    "max_new_tokens": [5],
    "mlp_only_layers": [[1], [], None, "other"],
    "moe_intermediate_size": [4, 12],
    "num_labels": [3],
    "num_local_experts": [1, 4, 0],
    "output_attentions": [True],
    "pad_token_id": [2, None],
    "partial_rotary_factor": [1.0, 0.25],
    "per_layer_config": [{"0": {"intermediate_size": 12}}],
    "problem_type": ["regression"],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_8bit": True}],
    "rescale_every": [1, 0],
    "rms_norm_eps": [0.1, -1.0, "1e-5"],
    "rope_parameters": [
        DEFAULT_ROTARY,
        dict(rope_theta=100.0),
        dict(DEFAULT_ROTARY, partial_rotary_factor=0.5),
        dict(DEFAULT_ROTARY, rope_type="linear", factor=2.0),
        dict(type="linear", rope_theta=100.0, factor=2.0),
        dict(DEFAULT_ROTARY, rope_type="yarn", factor=2.0),
        dict(LLAMA3, rope_theta=1e6),
        dict(LLAMA3, factor=0.5),
        dict(LLAMA3, high_freq_factor=8.0),
        dict(full_attention=DEFAULT_ROTARY),
        dict(DEFAULT_ROTARY, rope_theta=-1.0),
        {},
    ],
    "rope_scaling": [
        dict(type="linear", factor=2.0),
        dict(rope_type="dynamic", factor=2.0),
        dict(rope_type="default", factor=2.0),
        DEFAULT_ROTARY,
        None,
    ],
    "rope_theta": [100.0, 100],
    "rotary_emb_base": [100.0],
    "rotary_pct": [0.5, 0.25, 0.8],
    "shared_expert_intermediate_size": [8, 12],
    "sliding_window": [3, None, 1],
    "ssm_cfg": [{"layer": "Mamba2"}],
    "tie_word_embeddings": [True, False],
    "time_step_limit": [[0.0, 0.1], [0.01, float("inf")], [0.0, {"__float__": "Infinity"}], [0.0, float("inf")]],
    "time_step_rank": [3, "auto", 0],
    "torch_dtype": ["float16"],
    "use_bfloat16": [True],
    "use_falcon_mambapy": [True],
    "vocab_size": [23],
}
# Fields that mean something only together
TOGETHER = {
    "mamba": [dict(expand=16, intermediate_size=32), dict(expand=16, intermediate_size=40)],
    "falcon_mamba": [dict(expand=16, intermediate_size=48), dict(mixer_rms_eps=0.5, tie_word_embeddings=False)],
    "mamba2": [
        dict(num_heads=2, head_dim=16),
        dict(num_heads=2, head_dim=16, n_groups=2),
        dict(expand=1, num_heads=2),
        dict(hidden_size=32, num_heads=8),
        dict(norm_before_gate=True, rms_norm=True),
    ],
    "llama": [
        dict(attention_bias=True, mlp_bias=True),
        dict(attention_bias=True, mlp_bias=False),
        dict(sliding_window=3, use_sliding_window=True, max_window_layers=0),
        dict(rope_theta=50.0, rope_scaling=dict(rope_type="default")),
        dict(rope_theta=50.0, rope_parameters=DEFAULT_ROTARY),
        dict(rope_theta=50.0, partial_rotary_factor=0.5),
        dict(rope_scaling=dict(type="default"), rope_parameters=DEFAULT_ROTARY),
        dict(head_dim=6, num_attention_heads=2),
    ],
    "mistral": [
        dict(attention_bias=True, mlp_bias=True),
        dict(sliding_window=None, use_sliding_window=True),
        dict(sliding_window=0),
        dict(head_dim=6, num_key_value_heads=None),
    ],
    "mixtral": [
        dict(attention_bias=True, mlp_bias=True),
        dict(num_local_experts=1, num_experts_per_tok=1),
        dict(rope_theta=50.0, rope_scaling=dict(rope_type="default")),
        dict(head_dim=6, num_key_value_heads=None),
        dict(router_jitter_noise=0.5, output_router_logits=True),
    ],
    "gpt_neox": [
        dict(use_parallel_residual=False, rotary_pct=1.0),
        dict(rotary_pct=1.0, rope_parameters=dict(DEFAULT_ROTARY, partial_rotary_factor=0.5)),
        dict(rotary_emb_base=50.0, rope_scaling=dict(type="default")),
        dict(rope_theta=50.0, partial_rotary_factor=1.0),
    ],
    "recurrent_gemma": [
        dict(num_hidden_layers=3, block_types=["recurrent", "recurrent", "attention"], tie_word_embeddings=False),
        dict(hidden_size=24, num_attention_heads=2),  # their scale of the embedding is rounded
        dict(attention_bias=True, num_key_value_heads=2),
        dict(rope_theta=50.0, partial_rotary_factor=1.0, rope_scaling=dict(type="default")),
    ],
    "olmo_hybrid": [
        dict(linear_key_head_dim=None, linear_value_head_dim=None, linear_num_key_heads=None),
        dict(num_hidden_layers=3, layer_types=None),
        dict(rope_theta=None),
        dict(rope_parameters=dict(rope_type="default", rope_theta=None)),
    ],
    "qwen3_next": [
        dict(num_experts=0, mlp_only_layers=None),
        dict(num_experts_per_tok=1, norm_topk_prob=False),
        dict(num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=None),
        dict(rope_theta=50.0, partial_rotary_factor=0.5),
        dict(layer_types=["linear_attention"] * 2, full_attention_interval=1),
    ],
    "rwkv": [
        dict(attention_hidden_size=None, intermediate_size=None),
        dict(num_hidden_layers=3, rescale_every=2),
    ],
    "jamba": [
        dict(attn_layer_period=3, attn_layer_offset=2, use_cache=False),  # no attention
        dict(num_hidden_layers=6, attn_layer_period=3, attn_layer_offset=2),
        dict(num_experts=1, num_experts_per_tok=1),
        dict(num_local_experts=4),
        dict(head_dim=6, num_attention_heads=2),
        dict(sliding_window=3, attn_layer_period=1, attn_layer_offset=0),
        dict(rope_theta=50.0),
    ],
}


def other(name, default):
    """Other values of a field."""
    if name in CHANGED:
        return CHANGED[name]
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, int):
        return [default + 1]
    if isinstance(default, float):
        return [0.5 * default + 0.25]
    return ["other"]


def class_fields(family):
    """Fields of transformers' class, with their defaults."""
    kind = getattr(transformers, f"{CLASSES[family]}Config")
    return {field.name: field.default for field in dataclasses.fields(kind)}


def cases(family):
    """Each change of each field."""
    fields = class_fields(family)
    for name in dict.fromkeys([*fields, *FAMILIES[family].table]):
        tried = family not in FIRST and name in COMMON
        if name != "model_type" and not tried:  # model_type chooses the family
            yield from ({name: value} for value in other(name, fields.get(name)))
    yield from ({name: MISSING} for name in TINY[family] if name not in TOO_LARGE and family not in WIDE)
    yield from TOGETHER[family]
    yield from ({"a_field_that_nobody_knows": value} for value in (2.0, False))


def changed(family, change):
    config = {"model_type": family, **TINY[family], **change}
    return {name: value for name, value in config.items() if value is not MISSING}


@functools.cache
def weights_of(shapes):
    """Weights by name, the same for every config with the same names and shapes."""
    random = np.random.default_rng(1)

    def draw(name, shape):
        noise = random.normal(size=shape).astype(np.float32) * np.float32(0.3 if len(shape) > 1 else 0.2)
        return noise + np.float32(bool(SCALES.search(name)))

    return {name: draw(name, shape) for name, shape in shapes}


def oracle(config, directory):
    """Weights by name, logits [1, T, V] and the whole config of transformers for a config.json.

    None: it cannot make such a model.
    """
    (directory / "config.json").write_text(json.dumps(config))
    try:
        settings = transformers.AutoConfig.from_pretrained(directory)
        model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").float().eval()
        tensors = weights_of(tuple((name, tuple(p.shape)) for name, p in model.named_parameters()))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(tensors[name]))
            out = model(torch.from_numpy(TOKENS), use_cache=False)  # RWKV-4 with a wider average has no cache
            return tensors, (out[0] if isinstance(out, tuple) else out.logits).numpy(), settings.to_dict()
    except Exception:  # theirs has many kinds
        return None


KNOWN = {}  # our logits, by the fields of config.model as JSON


def our_logits(fields, params):
    """Logits [1, T, V] of our model. Weights are the same where the fields are."""
    key = json.dumps(fields, sort_keys=True)
    if key not in KNOWN:
        config = base().model
        config.update(fields)
        model = build(config, fields["vocab_size"])
        hidden, _ = model.apply({"params": params}, jnp.asarray(TOKENS, jnp.int32))
        KNOWN[key] = np.asarray(model.apply({"params": params}, hidden, method="logits"))
    return KNOWN[key]


def in_transformers_4(change):
    """The change as transformers 4 understands it, where 5 refuses or cannot run what 4 took."""
    meant = dict(return_dict=MISSING, use_return_dict=MISSING)
    if change.get("num_key_value_heads", MISSING) is None:
        meant["num_key_value_heads"] = change.get("num_attention_heads", HEADS["num_attention_heads"])
    return {name: meant.get(name, value) for name, value in change.items()}


def meant(fields):
    """Fields of config.model with the default rank of the step size, which transformers writes out."""
    mamba = fields.get("mamba", {})
    return fields | ({"mamba": mamba | {"dt_rank": mamba["dt_rank"] or -(-fields["width"] // 16)}} if mamba else {})


def name_of(case):
    return f"{case[0]}-" + ",".join(f"{name}={value!r}" for name, value in case[1].items()).replace(repr(MISSING), "?")


CASES = [(family, change) for family in TINY for change in cases(family)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Of torch: these models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family, change", CASES, ids=map(name_of, CASES))
@pytest.mark.filterwarnings("ignore")
def test_import_equals_transformers_or_names_the_field(family, change, tmp_path):
    config = changed(family, change)
    theirs = oracle(config, tmp_path) or oracle(changed(family, in_transformers_4(change)), tmp_path)
    tensors, want, whole = theirs or oracle(changed(family, {}), tmp_path)
    try:
        fields, params = from_huggingface(tensors, config)
        assert meant(from_huggingface(tensors, whole)[0]) == meant(fields)
    except UserError as error:
        assert "\n" not in str(error)
        assert any(name in str(error) for name in change), error
        assert not all(isinstance(FAMILIES[family].table.get(name), Harmless) for name in change), error
        return
    assert theirs is not None, "transformers cannot load what was imported"
    assert want.std() > 0.3
    error = np.abs(our_logits(fields, params) - want).max() / want.std()
    assert error < TOLERANCE, f"{error:.1e} of the standard deviation"


def test_every_family_is_here():
    assert TINY.keys() == CLASSES.keys() == FAMILIES.keys() - {"retnet"}  # of fla: test_interop_retnet.py


@pytest.mark.parametrize("family", TINY)
def test_every_field_of_transformers_is_decided(family):
    undecided = class_fields(family).keys() - FAMILIES[family].table.keys()
    assert not undecided, f"seqmodels/interop: what becomes of {', '.join(sorted(undecided))} in a {family} config?"


@pytest.mark.parametrize("family", TINY)
@pytest.mark.filterwarnings("ignore")
def test_honoured_fields_change_what_transformers_computes(family, tmp_path):
    """Or the test above would not see it if they were ignored."""
    tensors, logits, _ = oracle(changed(family, {}), tmp_path)
    honoured = {name for name, entry in FAMILIES[family].table.items() if isinstance(entry, Honoured)}
    for name in honoured - {"layer_types"}:  # which theirs reads with a cache only
        seen = (oracle(changed(family, change), tmp_path) for change in cases(family) if name in change)
        assert any(s and (s[0] is not tensors or np.abs(s[1] - logits).max() > 0.01) for s in seen), name


@pytest.mark.parametrize("family", TINY)
def test_missing_fields_are_transformers_defaults(family):
    defaults = class_fields(family)
    for name, entry in FAMILIES[family].table.items():
        if isinstance(entry, Honoured) and name in defaults:
            theirs = defaults[name]
            assert entry.default == (list(theirs) if isinstance(theirs, tuple) else theirs), name
        if isinstance(entry, Only) and name in defaults:
            assert defaults[name] in entry.values, name
