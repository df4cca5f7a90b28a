"""Fields, names and layouts of Llama and Mistral models of transformers."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from seqmodels.errors import UserError
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.mlp import MLP
from seqmodels.fields.rules import Rule, one_of
from seqmodels.interop.generic import COMMON, FRESH, TRAINING, sizes
from seqmodels.interop.table import (
    Honoured,
    Table,
    check_export,
    flag,
    harmless,
    honoured,
    integer,
    only,
    optional,
    positive,
    refuse,
)
from seqmodels.interop.weights import Weight, find, same, turned

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}  # theirs and ours
ACTIVATIONS |= {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
THEIR_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}  # and back: the first name of each
ROTARY = Rule(lambda value: value is None or isinstance(value, Mapping), "an object, or null")
# of seqmodels.layers.rope.stretched
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
stretch = Rule(lambda value: positive.test(value) and value >= 1, "a number, at least 1")
FULL = Rule(
    lambda value: value is None or (isinstance(value, list) and all(kind == "full_attention" for kind in value)),
    "'full_attention' for every layer, or null",
)

# transformers 5 has `rope_parameters`, with base and share in it; transformers 4 has `rope_scaling` and these apart
ROTARIES: Table = {
    "rope_parameters": Honoured(None, ROTARY),
    "rope_scaling": Honoured(None, ROTARY),
}
ATTENTION_AND_MLP: Table = {
    **COMMON,
    "num_attention_heads": Honoured(32, integer()),
    "head_dim": Honoured(None, optional(integer())),
    "hidden_act": Honoured("silu", one_of(*ACTIVATIONS)),
    "rms_norm_eps": Honoured(1e-6, positive),
    **ROTARIES,
    "rope_theta": Honoured(1e4, positive),
    "is_causal": only(True),  # false: every token sees every other
    "attention_chunk_size": only(None),  # bounds what their cache keeps
    **harmless(TRAINING, "attention_dropout"),
    **harmless("default rotary positions have no end", "max_position_embeddings"),
    **harmless("default rotary positions turn the whole head", "partial_rotary_factor"),
    **harmless("read by neither class", "max_window_layers", "use_sliding_window"),
    **harmless("splits products of matrices in transformers 4: changes the rounding only", "pretraining_tp"),
}
LLAMA: Table = {
    **ATTENTION_AND_MLP,
    **sizes(vocab_size=32000, width=4096, layers=32, tied=False),
    "intermediate_size": Honoured(11008, integer()),
    "num_key_value_heads": Honoured(None, optional(integer())),
    "attention_bias": Honoured(False, flag),
    "mlp_bias": Honoured(False, flag),
    "layer_types": Honoured(None, FULL),
    **harmless("their attention reads it in no call without a cache", "sliding_window"),
}
MISTRAL: Table = {
    **ATTENTION_AND_MLP,
    **sizes(vocab_size=32000, width=4096, layers=32, tied=False),
    "intermediate_size": Honoured(14336, integer()),
    "num_key_value_heads": Honoured(8, optional(integer())),
    "sliding_window": Honoured(4096, optional(integer())),
    "layer_types": only(None),  # with it AutoModel takes another class
    **harmless("their class has no biases", "attention_bias", "mlp_bias"),
}

PLAIN_ATTENTION: Table = {  # options of ours that their attention does not have
    **harmless(FRESH, "init_std"),
    "biases": only("all"),
    "rope_style": only("half"),
    "sinks": only(0),
    "mask": only("causal"),
    **harmless("read with other masks", "block", "stride", "summary", "near", "first", "random"),
    "softcap": only(0.0),
    "qk_norm": only("none"),
    **harmless("read with qk_norm", "qk_norm_eps"),
    "output_gate": only(False),
    "log_n": only(0),
    "forget": only(False),
}
UNSCALED: Table = {"scaling": only("none"), **harmless("read with scaling", "scaling_factor", "trained_length")}
EXPORTED: Table = honoured("bias")
EXPORTED_ATTENTION: Table = {
    **PLAIN_ATTENTION,
    **honoured("heads", "kv_heads", "head_dim", "rope_theta", "window"),
    "positions": only("rope"),
    "rotary": only(1.0),
    "scaling": only("none", "llama3"),
    "trained_length": only(0, LLAMA3["original_max_position_embeddings"]),
    **honoured("scaling_factor"),
}
EXPORTED_MLP: Table = {**honoured("hidden", "activation"), "gated": only(True)}


def rotary_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of model.attention for the rotary positions, by the rules of transformers 5.

    Raises:
        UserError: the positions are scaled in another way than those of Llama 3.1, or differ from layer to layer.
    """
    name = "rope_scaling" if theirs["rope_scaling"] else "rope_parameters"
    rotary = theirs[name] or {}
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind not in ("default", "llama3") or any(isinstance(value, Mapping) for value in rotary.values()):
        refuse(name, rotary, "only rope_type 'default' and 'llama3' can be converted")
    theta = rotary.get("rope_theta", theirs["rope_theta"])
    if not positive.test(theta):
        refuse(f"{name}.rope_theta", theta, f"allowed: {positive.words}")
    if kind == "default":
        return dict(rope_theta=theta)
    for field, value in LLAMA3.items():
        if rotary.get(field) != value:
            refuse(f"{name}.{field}", rotary.get(field), f"only {value} can be converted")
    if not stretch.test(rotary.get("factor")):
        refuse(f"{name}.factor", rotary.get("factor"), f"allowed: {stretch.words}")
    trained = LLAMA3["original_max_position_embeddings"]
    return dict(rope_theta=theta, scaling="llama3", scaling_factor=rotary["factor"], trained_length=trained)


def rotary_fields(attention: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of their config for the rotary positions, for transformers 5 and 4."""
    theta, factor = attention["rope_theta"], attention["scaling_factor"]
    if attention["scaling"] == "none":
        return dict(rope_theta=theta, rope_parameters=dict(rope_type="default", rope_theta=theta))
    rotary = dict(rope_type="llama3", rope_theta=theta, factor=factor, **LLAMA3)
    return dict(rope_theta=theta, rope_parameters=rotary, rope_scaling=rotary)


def heads_of(theirs: Mapping[str, Any], rotary: bool = True) -> dict[str, int]:
    """Heads of queries, heads of keys and channels of a head; `rotary`: whether positions turn pairs of channels."""
    width, heads, head_dim = theirs["hidden_size"], theirs["num_attention_heads"], theirs["head_dim"]
    kv_heads = heads if theirs["num_key_value_heads"] is None else theirs["num_key_value_heads"]
    if heads % kv_heads:
        refuse("num_key_value_heads", kv_heads, f"allowed: a divisor of num_attention_heads={heads}")
    if head_dim is None and width % heads:
        refuse("num_attention_heads", heads, f"allowed: a divisor of hidden_size={width}, or head_dim must be set")
    head_dim = width // heads if head_dim is None else head_dim
    if rotary and head_dim % 2:
        refuse("head_dim", head_dim, "allowed: an even number, as rotary positions turn pairs")
    return dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def config_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.model for the honoured fields of a Llama or Mistral config."""
    bias = theirs.get("attention_bias", False)  # a Mistral model has none, and a Llama model no window
    if theirs.get("mlp_bias", False) != bias:
        refuse("mlp_bias", theirs["mlp_bias"], f"allowed: the value of attention_bias, {bias}")
    return dict(
        pattern="attention+mlp",
        width=theirs["hidden_size"],
        repeats=theirs["num_hidden_layers"],
        vocab_size=theirs["vocab_size"],
        norm_eps=theirs["rms_norm_eps"],
        tie_embeddings=theirs["tie_word_embeddings"],
        **(dict(bias=True) if bias else {}),
        attention=dict(
            **heads_of(theirs),
            **rotary_of(theirs),
            window=theirs.get("sliding_window") or 0,
        ),
        mlp=dict(hidden=theirs["intermediate_size"], activation=ACTIVATIONS[theirs["hidden_act"]]),
    )


def head_sizes(model: Mapping[str, Any]) -> tuple[int, int, int]:
    """H heads of queries, K of keys, d channels."""
    heads, kv_heads, head_dim = (model["attention"][name] for name in ("heads", "kv_heads", "head_dim"))
    return heads, kv_heads, head_dim


def attention_weights(model: Mapping[str, Any], theirs: str, ours: tuple[str, ...]) -> list[Weight]:
    """The matrices of one attention, from their prefix to our path."""
    D, (H, K, d) = model["width"], head_sizes(model)
    return [
        turned(f"{theirs}q_proj.weight", (H * d, D), (*ours, "query"), (D, H, d)),
        turned(f"{theirs}k_proj.weight", (K * d, D), (*ours, "key"), (D, K, d)),
        turned(f"{theirs}v_proj.weight", (K * d, D), (*ours, "value"), (D, K, d)),
        turned(f"{theirs}o_proj.weight", (D, H * d), (*ours, "out"), (H, d, D)),
    ]


def mlp_weights(model: Mapping[str, Any], theirs: str, ours: tuple[str, ...]) -> list[Weight]:
    """The matrices of one SwiGLU, from their prefix to our path."""
    D, F = model["width"], model["mlp"]["hidden"]
    return [
        turned(f"{theirs}gate_proj.weight", (F, D), (*ours, "gate"), (D, F)),
        turned(f"{theirs}up_proj.weight", (F, D), (*ours, "up"), (D, F)),
        turned(f"{theirs}down_proj.weight", (D, F), (*ours, "down"), (F, D)),
    ]


def weights(model: Mapping[str, Any]) -> list[Weight]:
    """Every tensor of a Llama or Mistral model."""
    V, D, layers, F = model["vocab_size"], model["width"], model["repeats"], model["mlp"]["hidden"]
    H, K, d = head_sizes(model)
    found = [
        same("model.embed_tokens.weight", ("embedding",), V, D),
        same("model.norm.weight", ("final_norm", "scale"), D),
    ]
    for i in range(layers):
        block, mixer, mlp = (f"block_{i}",), (f"block_{i}", "mixer"), (f"block_{i}", "mlp")
        theirs = f"model.layers.{i}."
        found += [
            same(f"{theirs}input_layernorm.weight", (*block, "norm", "scale"), D),
            *attention_weights(model, f"{theirs}self_attn.", mixer),
            same(f"{theirs}post_attention_layernorm.weight", (*block, "mlp_norm", "scale"), D),
            *mlp_weights(model, f"{theirs}mlp.", mlp),
        ]
        if model.get("bias"):
            found += [
                same(f"{theirs}self_attn.q_proj.bias", (*mixer, "query_bias"), H * d),
                same(f"{theirs}self_attn.k_proj.bias", (*mixer, "key_bias"), K * d),
                same(f"{theirs}self_attn.v_proj.bias", (*mixer, "value_bias"), K * d),
                same(f"{theirs}self_attn.o_proj.bias", (*mixer, "out_bias"), D),
                same(f"{theirs}mlp.gate_proj.bias", (*mlp, "gate_bias"), F),
                same(f"{theirs}mlp.up_proj.bias", (*mlp, "up_bias"), F),
                same(f"{theirs}mlp.down_proj.bias", (*mlp, "down_bias"), D),
            ]
    return found


def sized(model: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """config.model with every default of attention and MLP filled in. The sizes come from the parameters."""
    attention, mlp = (group.complete(model.get(group.name, {})) for group in (ATTENTION, MLP))
    check_export(attention, EXPORTED_ATTENTION, ATTENTION.home)
    check_export(mlp, EXPORTED_MLP, MLP.home)
    _, heads, head_dim = np.shape(find(params, ("block_0", "mixer", "query")))
    _, kv_heads, _ = np.shape(find(params, ("block_0", "mixer", "key")))
    _, hidden = np.shape(find(params, ("block_0", "mlp", "gate")))
    return {
        **model,
        "attention": {**attention, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim},
        "mlp": {**mlp, "hidden": hidden},
    }


def exported(model: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.model with the sizes that `weights` needs, and the fields of their config.json."""
    model = sized(model, params)
    attention, bias = model["attention"], bool(model.get("bias"))
    mistral = bool(attention["window"])
    if mistral and bias:
        raise UserError("model.bias is True; only False can be exported with model.attention.window, as in Mistral")
    biases = {} if mistral else dict(attention_bias=bias, mlp_bias=bias)
    fields = dict(
        model_type="mistral" if mistral else "llama",
        architectures=["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        hidden_act=THEIR_ACTIVATIONS[model["mlp"]["activation"]],
        intermediate_size=model["mlp"]["hidden"],
        num_attention_heads=attention["heads"],
        num_key_value_heads=attention["kv_heads"],
        head_dim=attention["head_dim"],
        rms_norm_eps=model["norm_eps"],
        **rotary_fields(attention),
        **(dict(sliding_window=attention["window"]) if mistral else biases),
    )
    return model, fields
