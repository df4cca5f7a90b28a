"""Fields, names and layouts of RecurrentGemma (Griffin) models of transformers."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from seqmodels import pattern
from seqmodels.errors import UserError
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.mlp import MLP
from seqmodels.fields.rglru import RGLRU
from seqmodels.fields.rules import Rule
from seqmodels.interop import gpt_neox, llama
from seqmodels.interop.generic import COMMON, FRESH, TRAINING, check_layers, repeated, sizes
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

MIXERS = {"recurrent": "rglru", "attention": "attention"}  # theirs and ours
THEIR_MIXERS = {ours: theirs for theirs, ours in MIXERS.items()}
ROTARY = "rope_theta", "partial_rotary_factor"  # fields of the base and the share of rotary positions
KINDS = Rule(
    lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(kind in MIXERS for kind in value),
    "a list of 'recurrent' and 'attention'",
)
HALVES = Rule(lambda value: integer(2).test(value) and value % 2 == 0, "an even integer, at least 2")

RECURRENT_GEMMA: Table = {
    **COMMON,
    **sizes(vocab_size=256000, width=2560, layers=26, tied=True),
    "intermediate_size": Honoured(3 * 2560, HALVES),
    "num_attention_heads": Honoured(10, integer()),
    "num_key_value_heads": Honoured(None, optional(integer())),
    "head_dim": Honoured(None, optional(integer())),
    "lru_width": Honoured(None, optional(integer())),
    "attention_window_size": Honoured(2048, integer()),
    "attention_bias": Honoured(False, flag),
    "conv1d_width": Honoured(4, integer(2, 8)),
    "logits_soft_cap": Honoured(30.0, positive),
    "rms_norm_eps": Honoured(1e-6, positive),
    "hidden_activation": only("gelu_pytorch_tanh"),
    "block_types": Honoured(["recurrent", "recurrent", "attention"], KINDS),
    **llama.ROTARIES,
    "rope_theta": Honoured(1e4, positive),
    "partial_rotary_factor": Honoured(0.5, gpt_neox.SHARE),
    "is_causal": only(True),
    "attention_chunk_size": only(None),
    **harmless(TRAINING, "attention_dropout"),
    **harmless(FRESH, "final_w_init_variance_scale", "w_init_variance_scale"),
    **harmless("their embedding is always scaled", "embeddings_scale_by_sqrt_dim"),
    **harmless("rotary positions have no end", "max_position_embeddings"),
}
EXPORTED: Table = {
    "bias": only(True),
    "norm": only("centred"),
    **honoured("embedding_scale", "logit_softcap"),  # `exported` looks at their values
}
EXPORTED_ATTENTION: Table = {
    **llama.PLAIN_ATTENTION,
    **honoured("heads", "kv_heads", "head_dim", "rope_theta", "rotary", "window", "biases"),
    "positions": only("rope"),
    **llama.UNSCALED,
}
EXPORTED_MLP: Table = {**honoured("hidden"), "activation": only("gelu_tanh"), "gated": only(True)}
EXPORTED_RGLRU: Table = honoured("hidden", "heads", "conv")


def embedding_scale(width: int) -> float:
    """The root of the width as their buffer holds it, in bfloat16."""
    import ml_dtypes

    return float(np.asarray(width**0.5).astype(ml_dtypes.bfloat16))


def config_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.model for the honoured fields of a RecurrentGemma config."""
    check_layers(theirs)
    width, layers, kinds = theirs["hidden_size"], theirs["num_hidden_layers"], theirs["block_types"]
    if layers > 100 * len(kinds):
        refuse("num_hidden_layers", layers, f"allowed: at most 100 times the {len(kinds)} block_types")
    text, repeats = repeated([f"{MIXERS[kinds[i % len(kinds)]]}+mlp" for i in range(layers)])
    heads, inner = theirs["num_attention_heads"], theirs["lru_width"] or width
    if inner % heads:
        refuse("lru_width", inner, f"allowed: a multiple of num_attention_heads={heads}")
    rotary = gpt_neox.rotary_of(theirs, *ROTARY)
    attention = dict(**llama.heads_of(theirs), **rotary, window=theirs["attention_window_size"])
    gpt_neox.check_turned("partial_rotary_factor", rotary, attention["head_dim"])
    return dict(
        pattern=text,
        width=width,
        repeats=repeats,
        vocab_size=theirs["vocab_size"],
        norm="centred",
        norm_eps=theirs["rms_norm_eps"],
        bias=True,
        embedding_scale=embedding_scale(width),
        logit_softcap=theirs["logits_soft_cap"],
        tie_embeddings=theirs["tie_word_embeddings"],
        rglru=dict(hidden=inner, heads=heads, conv=theirs["conv1d_width"]),
        attention=dict(attention, biases="all" if theirs["attention_bias"] else "out"),
        mlp=dict(hidden=theirs["intermediate_size"] // 2, activation="gelu_tanh"),
    )


def weights(model: Mapping[str, Any]) -> list[Weight]:
    """Every tensor of a RecurrentGemma model."""
    V, D, F = model["vocab_size"], model["width"], model["mlp"]["hidden"]
    found = [
        same("model.embed_tokens.weight", ("embedding",), V, D),
        same("model.final_norm.weight", ("final_norm", "scale"), D),
    ]
    blocks = pattern.parse(model["pattern"]) * model["repeats"]
    for i, ((mixer,), _) in enumerate(blocks):
        block, theirs = f"block_{i}", f"model.layers.{i}."
        mixer_weights = recurrent_weights if mixer == "rglru" else attention_weights
        found += [
            same(f"{theirs}temporal_pre_norm.weight", (block, "norm", "scale"), D),
            *mixer_weights(model, f"{theirs}temporal_block.", (block, "mixer")),
            same(f"{theirs}channel_pre_norm.weight", (block, "mlp_norm", "scale"), D),
            *llama.mlp_weights(model, f"{theirs}mlp_block.", (block, "mlp")),
            same(f"{theirs}mlp_block.gate_proj.bias", (block, "mlp", "gate_bias"), F),
            same(f"{theirs}mlp_block.up_proj.bias", (block, "mlp", "up_bias"), F),
            same(f"{theirs}mlp_block.down_proj.bias", (block, "mlp", "down_bias"), D),
        ]
    return found


def attention_weights(model: Mapping[str, Any], theirs: str, ours: tuple[str, ...]) -> list[Weight]:
    """The tensors of one attention, from their prefix to our path."""
    H, K, d = llama.head_sizes(model)
    biases = [("q", "query", H), ("k", "key", K), ("v", "value", K)] if model["attention"]["biases"] == "all" else []
    return [
        *llama.attention_weights(model, theirs, ours),
        *(same(f"{theirs}{letter}_proj.bias", (*ours, f"{name}_bias"), heads * d) for letter, name, heads in biases),
        same(f"{theirs}o_proj.bias", (*ours, "out_bias"), model["width"]),
    ]


def recurrent_weights(model: Mapping[str, Any], theirs: str, ours: tuple[str, ...]) -> list[Weight]:
    """The tensors of one recurrent block, from their prefix to our path."""
    D, (E, H, W) = model["width"], (model["rglru"][name] for name in ("hidden", "heads", "conv"))
    size, lru, found = E // H, f"{theirs}rg_lru.", []
    for letter, name, rows, columns in (("x", "in", E, D), ("y", "gate", E, D), ("out", "out", D, E)):
        linear = f"{theirs}linear_{letter}."
        found += [
            turned(f"{linear}weight", (rows, columns), (*ours, f"{name}_proj"), (columns, rows)),
            same(f"{linear}bias", (*ours, f"{name}_bias"), rows),
        ]
    for name, gate in (("recurrent", "recurrence"), ("input", "input")):
        found += [
            same(f"{lru}{name}_gate_weight", (*ours, f"{gate}_gate"), H, size, size),
            Weight(f"{lru}{name}_gate_bias", (H, size), (*ours, f"{gate}_gate_bias"), (E,)),
        ]
    return [
        *found,
        turned(f"{theirs}conv_1d.weight", (E, 1, W), (*ours, "conv_weight"), (W, E)),
        same(f"{theirs}conv_1d.bias", (*ours, "conv_bias"), E),
        same(f"{lru}recurrent_param", (*ours, "rate"), E),
    ]


def exported(model: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.model with the sizes that `weights` needs, and the fields of their config.json."""
    mixers = [mixer for (mixer,), _ in pattern.parse(model["pattern"]) * model["repeats"]]
    _check(model)
    model = _sized(model, params, mixers)
    rglru, mlp = model["rglru"], model["mlp"]
    fields = dict(
        model_type="recurrent_gemma",
        architectures=["RecurrentGemmaForCausalLM"],
        block_types=[THEIR_MIXERS[mixer] for mixer in mixers],
        hidden_activation="gelu_pytorch_tanh",
        intermediate_size=2 * mlp["hidden"],
        num_attention_heads=rglru["heads"],
        lru_width=rglru["hidden"],
        conv1d_width=rglru["conv"],
        logits_soft_cap=model["logit_softcap"],
        rms_norm_eps=model["norm_eps"],
    )
    if "attention" in mixers:
        attention = model["attention"]
        fields |= dict(
            num_key_value_heads=attention["kv_heads"],
            head_dim=attention["head_dim"],
            attention_window_size=attention["window"],
            attention_bias=attention["biases"] == "all",
            **gpt_neox.rotary_fields(attention, *ROTARY),
        )
    return model, fields


def _check(model: Mapping[str, Any]) -> None:
    """Raise a UserError for a scale or a limit that their models do not have."""
    if model["embedding_scale"] != (scale := embedding_scale(model["width"])):
        problem = f"only {scale}, the root of model.width in bfloat16, can be exported"
        raise UserError(f"model.embedding_scale is {model['embedding_scale']}; {problem}")
    if not model["logit_softcap"]:
        raise UserError("model.logit_softcap is 0; only what is above 0 can be exported")


def _sized(model: Mapping[str, Any], params: Mapping[str, Any], mixers: list[str]) -> dict[str, Any]:
    """config.model with the options of every branch; the sizes come from the parameters.

    Raises:
        UserError: an option cannot be exported, or the heads of the RG-LRU are not as many as those of attention.
    """
    rglru, attention, mlp = (group.complete(model.get(group.name, {})) for group in (RGLRU, ATTENTION, MLP))
    check_export(rglru, EXPORTED_RGLRU, RGLRU.home)
    check_export(mlp, EXPORTED_MLP, MLP.home)
    _, inner = np.shape(find(params, (f"block_{mixers.index('rglru')}", "mixer", "in_proj")))
    _, hidden = np.shape(find(params, ("block_0", "mlp", "gate")))
    sized = {**model, "rglru": rglru | dict(hidden=inner), "mlp": mlp | dict(hidden=hidden)}
    if "attention" not in mixers:
        return sized
    check_export(attention, EXPORTED_ATTENTION, ATTENTION.home)
    mixer = (f"block_{mixers.index('attention')}", "mixer")
    _, heads, head_dim = np.shape(find(params, (*mixer, "query")))
    _, kv_heads, _ = np.shape(find(params, (*mixer, "key")))
    if heads != rglru["heads"]:
        problem = f"only model.attention.heads, {heads}, can be exported, as theirs have one number"
        raise UserError(f"{RGLRU.place('heads')} is {rglru['heads']}; {problem}")
    if not attention["window"]:
        raise UserError(f"{ATTENTION.place('window')} is 0; only what is above 0 can be exported")
    return {**sized, "attention": attention | dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim)}
