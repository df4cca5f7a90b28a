"""Fields, names and layouts of OLMo Hybrid models of transformers.

Layers with linear attention have their norms before the branches, those with attention behind them. In files the
convolutions of queries, keys and values are apart; in memory transformers has them in one tensor, and other names of
the norms.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from seqmodels import pattern
from seqmodels.fields.rules import one_of
from seqmodels.interop import llama, qwen3_next
from seqmodels.interop.generic import COMMON, FRESH, check_layers, repeated, sizes
from seqmodels.interop.table import Honoured, Table, flag, harmless, honoured, integer, only, optional, positive, refuse
from seqmodels.interop.weights import Weight, same, turned

EPSILON = 1e-5  # of the heads' norm of linear attention; no field changes it
NORMS = {  # of both kinds of layers, in files
    "gated_deltanet": ("attention_layer_norm", "feedforward_layer_norm"),
    "attention": ("post_attention_layernorm", "post_feedforward_layernorm"),
}

OLMO_HYBRID: Table = {
    **COMMON,
    **qwen3_next.DELTA,
    **sizes(vocab_size=100352, width=3840, layers=32, tied=False),
    "intermediate_size": Honoured(11008, integer()),
    "num_attention_heads": Honoured(30, integer()),
    "num_key_value_heads": Honoured(None, optional(integer())),
    "head_dim": Honoured(None, optional(integer())),
    "hidden_act": Honoured("silu", one_of("silu", "swish")),
    "rms_norm_eps": Honoured(1e-6, positive),
    "linear_key_head_dim": Honoured(None, optional(integer())),
    "linear_value_head_dim": Honoured(None, optional(integer())),
    "linear_num_key_heads": Honoured(None, optional(integer())),
    "linear_num_value_heads": Honoured(None, optional(integer())),
    "linear_allow_neg_eigval": Honoured(True, flag),
    **llama.ROTARIES,
    "rope_theta": Honoured(1e4, optional(positive)),
    **harmless(FRESH, "linear_a_log_max", "linear_a_log_min", "linear_dt_init_floor", "linear_dt_max", "linear_dt_min"),
}
EXPORTED: Table = {"norms_behind": only("attention")}
EXPORTED_ATTENTION: Table = {
    **llama.PLAIN_ATTENTION,
    **honoured("heads", "kv_heads", "head_dim", "rope_theta", "qk_norm_eps"),
    "positions": only("rope", "none"),
    "rotary": only(1.0),
    "qk_norm": only("all"),
    "window": only(0),
    **llama.UNSCALED,
}


def config_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.model for the honoured fields of an OLMo Hybrid config."""
    check_layers(theirs)
    kinds = kinds_of(theirs)
    qwen3_next.check_kinds(theirs, kinds)
    if len(set(kinds)) == 1:
        refuse("layer_types", kinds, "allowed: both kinds of layers")
    text, repeats = repeated([f"{qwen3_next.MIXERS[kind]}+mlp" for kind in kinds])
    epsilon, width, heads = (theirs[name] for name in ("rms_norm_eps", "hidden_size", "num_attention_heads"))
    named = {name: theirs[name] or heads for name in ("linear_num_key_heads", "linear_num_value_heads")}
    key_dim = theirs["linear_key_head_dim"] or int(0.75 * width / named["linear_num_key_heads"])
    rotary = rotary_of(theirs)
    attention = llama.heads_of(theirs, rotary="rope_theta" in rotary) | rotary
    return dict(
        pattern=text,
        width=width,
        repeats=repeats,
        vocab_size=theirs["vocab_size"],
        norms_behind="attention",
        norm_eps=epsilon,
        tie_embeddings=theirs["tie_word_embeddings"],
        attention=dict(attention, qk_norm="all", qk_norm_eps=epsilon),
        gated_deltanet=dict(
            **qwen3_next.delta_of({**theirs, **named}),
            key_dim=key_dim,
            value_dim=theirs["linear_value_head_dim"] or 2 * key_dim,
            negative_eigenvalues=theirs["linear_allow_neg_eigval"],
            norm_eps=EPSILON,
        ),
        mlp=dict(hidden=theirs["intermediate_size"]),
    )


def kinds_of(theirs: Mapping[str, Any]) -> list[str]:
    """`layer_types`; by default every fourth layer has attention, or the last."""
    if theirs["layer_types"] is not None:
        return list(theirs["layer_types"])
    layers = theirs["num_hidden_layers"]
    kinds = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)]
    return kinds if layers > 3 else [*kinds[:-1], "full_attention"]


def rotary_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of model.attention for the rotary positions; the released models have `rope_theta: null`, and so none."""
    rotary = theirs["rope_scaling"] or theirs["rope_parameters"] or {}
    if rotary.get("rope_theta", theirs["rope_theta"]) is None:
        return dict(positions="none")
    return llama.rotary_of(theirs)


def as_in_files(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors under the names of the authors' files; a model in memory, and files of transformers, have others."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.layers\.\d+\.)(.+)", name)
        if match is None:
            found[name] = tensor
        elif f"{match[1]}linear_attn.q_proj.weight" in tensors:
            rest = match[2].replace("input_layernorm", "attention_layer_norm")
            found[match[1] + rest.replace("post_attention_layernorm", "feedforward_layer_norm")] = tensor
        else:
            found[match[1] + match[2].replace("feedforward_layer_norm", "post_attention_layernorm")] = tensor
    for name in [name for name in found if name.endswith(".linear_attn.q_proj.weight")]:
        split_taps(found, name.removesuffix("q_proj.weight"))
    return found


def split_taps(tensors: dict[str, Any], prefix: str) -> None:
    """Give each of queries, keys and values the taps of its own channels, in place.

    transformers has them in one tensor in memory, and in its files in three of about equal size, whatever they are of.
    """
    names = [f"{prefix}{letter}_conv1d.weight" for letter in "qkv"]
    keys, whole = tensors[f"{prefix}q_proj.weight"].shape[0], f"{prefix}conv1d.weight"
    if whole in tensors:
        taps = np.asarray(tensors.pop(whole))
    elif all(name in tensors for name in names) and tensors[names[0]].shape[0] != keys:
        taps = np.concatenate([np.asarray(tensors[name]) for name in names])
    else:
        return
    tensors |= zip(names, (taps[:keys], taps[keys : 2 * keys], taps[2 * keys :]), strict=True)


def weights(model: Mapping[str, Any]) -> list[Weight]:
    """Every tensor of an OLMo Hybrid model."""
    V, D = model["vocab_size"], model["width"]
    found = [
        same("model.embed_tokens.weight", ("embedding",), V, D),
        same("model.norm.weight", ("final_norm", "scale"), D),
    ]
    for i, ((mixer,), _) in enumerate(pattern.parse(model["pattern"]) * model["repeats"]):
        block, theirs, (first, second) = f"block_{i}", f"model.layers.{i}.", NORMS[mixer]
        found += [
            same(f"{theirs}{first}.weight", (block, "norm", "scale"), D),
            same(f"{theirs}{second}.weight", (block, "mlp_norm", "scale"), D),
            *llama.mlp_weights(model, f"{theirs}mlp.", (block, "mlp")),
        ]
        if mixer == "attention":
            found += attention_weights(model, f"{theirs}self_attn.", (block, "mixer"))
        else:
            found += delta_weights(model, f"{theirs}linear_attn.", (block, "mixer"))
    return found


def attention_weights(model: Mapping[str, Any], theirs: str, ours: tuple[str, ...]) -> list[Weight]:
    """The tensors of one attention, from their prefix to our path."""
    H, K, d = llama.head_sizes(model)
    return [
        *llama.attention_weights(model, theirs, ours),
        same(f"{theirs}q_norm.weight", (*ours, "query_norm", "scale"), H * d),
        same(f"{theirs}k_norm.weight", (*ours, "key_norm", "scale"), K * d),
    ]


def delta_weights(model: Mapping[str, Any], theirs: str, ours: tuple[str, ...]) -> list[Weight]:
    """The tensors of one Gated DeltaNet, from their prefix to our path."""
    D, options = model["width"], model["gated_deltanet"]
    H, G, K, P, W = (options[name] for name in ("heads", "key_heads", "key_dim", "value_dim", "conv"))
    shapes = dict(q=("q_proj", G, K), k=("k_proj", G, K), v=("v_proj", H, P), g=("gate_proj", H, P))
    found = [
        turned(f"{theirs}{letter}_proj.weight", (heads * size, D), (*ours, name), (D, heads, size))
        for letter, (name, heads, size) in shapes.items()
    ]
    for letter, size in (("q", G * K), ("k", G * K), ("v", H * P)):
        found.append(turned(f"{theirs}{letter}_conv1d.weight", (size, 1, W), (*ours, f"{letter}_conv"), (W, size)))
    return [
        *found,
        turned(f"{theirs}b_proj.weight", (H, D), (*ours, "beta_proj"), (D, H)),
        turned(f"{theirs}a_proj.weight", (H, D), (*ours, "dt_proj"), (D, H)),
        same(f"{theirs}dt_bias", (*ours, "dt_bias"), H),
        same(f"{theirs}A_log", (*ours, "A_log"), H),
        same(f"{theirs}o_norm.weight", (*ours, "scale"), P),
        turned(f"{theirs}o_proj.weight", (D, H * P), (*ours, "out_proj"), (H, P, D)),
    ]


def exported(model: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.model with the sizes that `weights` needs, and the fields of their config.json."""
    mixers = [mixer for (mixer,), _ in pattern.parse(model["pattern"]) * model["repeats"]]
    first = {name: mixers.index(name) for name in ("gated_deltanet", "attention")}
    delta = qwen3_next.delta_sized(model, params, first["gated_deltanet"], qwen3_next.EXPORTED_DELTA, EPSILON)
    attention = qwen3_next.attention_sized(model, params, first["attention"], EXPORTED_ATTENTION)
    mlp = qwen3_next.mlp_sized(model, params, 0)
    theta = attention["rope_theta"] if attention["positions"] == "rope" else None
    fields = dict(
        model_type="olmo_hybrid",
        architectures=["OlmoHybridForCausalLM"],
        hidden_act="silu",
        pad_token_id=None,  # their default is beyond small vocabularies
        layer_types=[qwen3_next.THEIR_MIXERS[mixer] for mixer in mixers],
        intermediate_size=mlp["hidden"],
        num_attention_heads=attention["heads"],
        num_key_value_heads=attention["kv_heads"],
        head_dim=attention["head_dim"],
        rms_norm_eps=model["norm_eps"],
        rope_theta=theta,
        rope_parameters=dict(rope_type="default", rope_theta=theta),
        **qwen3_next.delta_fields(delta),
        linear_allow_neg_eigval=delta["negative_eigenvalues"],
    )
    return {**model, "gated_deltanet": delta, "attention": attention, "mlp": mlp}, fields
