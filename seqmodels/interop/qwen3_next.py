"""Fields, names and layouts of Qwen3-Next models of transformers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from seqmodels import pattern
from seqmodels.errors import UserError
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.gated_deltanet import GATED_DELTANET
from seqmodels.fields.mlp import MLP
from seqmodels.fields.moe import MOE
from seqmodels.fields.rules import Rule
from seqmodels.interop import experts, gpt_neox, llama
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
from seqmodels.interop.weights import Weight, find, parts, same, turned

NAMES = experts.Names(prefix="mlp.", router="gate", gate="gate_proj", up="up_proj", down="down_proj")
MIXERS = {"linear_attention": "gated_deltanet", "full_attention": "attention"}  # theirs and ours
THEIR_MIXERS = {ours: theirs for theirs, ours in MIXERS.items()}
ROTARY = "rope_theta", "partial_rotary_factor"  # fields of the base and the share of rotary positions
KINDS = Rule(
    lambda value: isinstance(value, list | tuple) and all(kind in MIXERS for kind in value),
    "a list of 'linear_attention' and 'full_attention'",
)
NUMBERS = Rule(lambda value: isinstance(value, list) and all(map(integer(0).test, value)), "a list of layers' numbers")

DELTA: Table = {  # of the layers with linear attention, here and in OLMo Hybrid
    "linear_conv_kernel_dim": Honoured(4, integer(2, 8)),
    "layer_types": Honoured(None, optional(KINDS)),
    "is_causal": only(True),
    "attention_chunk_size": only(None),
    "attention_bias": only(False),
    **harmless(TRAINING, "attention_dropout"),
    **harmless("default rotary positions have no end", "max_position_embeddings"),
}
QWEN3_NEXT: Table = {
    **COMMON,
    **experts.ROUTING,
    **DELTA,
    **sizes(vocab_size=151936, width=2048, layers=48, tied=False),
    "intermediate_size": Honoured(5632, integer()),
    "num_attention_heads": Honoured(16, integer()),
    "num_key_value_heads": Honoured(2, integer()),
    "head_dim": Honoured(256, integer()),
    "rms_norm_eps": Honoured(1e-6, positive),
    "linear_key_head_dim": Honoured(128, integer()),
    "linear_value_head_dim": Honoured(128, integer()),
    "linear_num_key_heads": Honoured(16, integer()),
    "linear_num_value_heads": Honoured(32, integer()),
    "full_attention_interval": Honoured(4, integer()),
    "num_experts": Honoured(512, integer(0)),
    "num_experts_per_tok": Honoured(10, integer()),
    "moe_intermediate_size": Honoured(512, integer()),
    "shared_expert_intermediate_size": Honoured(512, integer()),
    "norm_topk_prob": Honoured(True, flag),
    "decoder_sparse_step": Honoured(1, integer()),
    "mlp_only_layers": Honoured(None, optional(NUMBERS)),
    **llama.ROTARIES,
    "rope_theta": Honoured(1e4, positive),
    "partial_rotary_factor": Honoured(0.25, gpt_neox.SHARE),
}
EXPORTED: Table = {"norm": only("centred")}
EXPORTED_DELTA: Table = {
    **honoured("heads", "key_heads", "key_dim", "value_dim", "conv", "negative_eigenvalues", "norm_eps"),
    **harmless(FRESH, "dt_min", "dt_max", "dt_floor"),
}
EXPORTED_GATED_DELTANET: Table = {**EXPORTED_DELTA, "negative_eigenvalues": only(False)}
EXPORTED_ATTENTION: Table = {
    **llama.PLAIN_ATTENTION,
    **honoured("heads", "kv_heads", "head_dim", "rope_theta", "rotary", "qk_norm_eps"),
    "positions": only("rope"),
    "qk_norm": only("centred"),
    "output_gate": only(True),
    "window": only(0),
    **llama.UNSCALED,
}
EXPORTED_MLP: Table = {**honoured("hidden"), "activation": only("silu"), "gated": only(True)}
EXPORTED_MOE: Table = {
    **experts.EXPORTED,
    "router": only("softmax", "renormalised"),
    **honoured("shared"),
    "shared_gate": only(True),
}


def config_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.model for the honoured fields of a Qwen3-Next config."""
    text, repeats = repeated(blocks_of(theirs))
    epsilon = theirs["rms_norm_eps"]
    rotary = gpt_neox.rotary_of(theirs, *ROTARY)
    heads = llama.heads_of(theirs)
    gpt_neox.check_turned("partial_rotary_factor", rotary, heads["head_dim"])
    model = dict(
        pattern=text,
        width=theirs["hidden_size"],
        repeats=repeats,
        vocab_size=theirs["vocab_size"],
        norm="centred",
        norm_eps=epsilon,
        tie_embeddings=theirs["tie_word_embeddings"],
        attention=dict(**heads, **rotary, qk_norm="centred", qk_norm_eps=epsilon, output_gate=True),
        gated_deltanet=dict(
            **delta_of(theirs),
            key_dim=theirs["linear_key_head_dim"],
            value_dim=theirs["linear_value_head_dim"],
            norm_eps=epsilon,
        ),
        mlp=dict(hidden=theirs["intermediate_size"]),
    )
    return model | (dict(moe=moe_of(theirs)) if "moe" in text else {})


def blocks_of(theirs: Mapping[str, Any]) -> list[str]:
    """Every block from bottom to top, as a word of our patterns."""
    check_layers(theirs)
    layers, kinds = theirs["num_hidden_layers"], theirs["layer_types"]
    if kinds is None:
        every = theirs["full_attention_interval"]
        kinds = ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(layers)]
    check_kinds(theirs, kinds)
    sparse = [
        theirs["num_experts"] > 0
        and i not in (theirs["mlp_only_layers"] or ())
        and (i + 1) % theirs["decoder_sparse_step"] == 0
        for i in range(layers)
    ]
    return [f"{MIXERS[kind]}+{'moe' if moe else 'mlp'}" for kind, moe in zip(kinds, sparse, strict=True)]


def check_kinds(theirs: Mapping[str, Any], kinds: Sequence[str]) -> None:
    """Raise a UserError unless `layer_types` has one entry a layer."""
    if len(kinds) != theirs["num_hidden_layers"]:
        refuse("layer_types", kinds, f"allowed: one for each of num_hidden_layers={theirs['num_hidden_layers']}")


def delta_of(theirs: Mapping[str, Any]) -> dict[str, int]:
    """Heads of values, of keys, and tokens of the convolution of a Gated DeltaNet."""
    heads, key_heads = theirs["linear_num_value_heads"], theirs["linear_num_key_heads"]
    if heads % key_heads:
        refuse("linear_num_key_heads", key_heads, f"allowed: a divisor of linear_num_value_heads={heads}")
    return dict(heads=heads, key_heads=key_heads, conv=theirs["linear_conv_kernel_dim"])


def moe_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of model.moe."""
    experts.check_top_k(theirs, "num_experts")
    top_k, hidden, shared = (
        theirs[name] for name in ("num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
    )
    if top_k == 1 < theirs["num_experts"] and theirs["norm_topk_prob"]:
        refuse("num_experts_per_tok", 1, "only 2 and more can be converted: the weight of a single expert is always 1")
    if shared % hidden:
        allowed = f"only multiples of moe_intermediate_size={hidden} can be converted"
        refuse("shared_expert_intermediate_size", shared, allowed)
    return dict(
        experts=theirs["num_experts"],
        top_k=top_k,
        hidden=hidden,
        router="renormalised" if theirs["norm_topk_prob"] else "softmax",
        shared=shared // hidden,
        shared_gate=True,
    )


def as_in_files(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under the names of files, without those that predict further tokens, which transformers drops too."""
    tensors = {name: tensor for name, tensor in tensors.items() if not name.removeprefix("model.").startswith("mtp.")}
    return experts.per_expert(tensors, NAMES, fused="mlp.")


def weights(model: Mapping[str, Any]) -> list[Weight]:
    """Every tensor of a Qwen3-Next model."""
    V, D = model["vocab_size"], model["width"]
    found = [
        same("model.embed_tokens.weight", ("embedding",), V, D),
        same("model.norm.weight", ("final_norm", "scale"), D),
    ]
    for i, ((mixer,), (channel,)) in enumerate(pattern.parse(model["pattern"]) * model["repeats"]):
        block, theirs = f"block_{i}", f"model.layers.{i}."
        found += [
            same(f"{theirs}input_layernorm.weight", (block, "norm", "scale"), D),
            same(f"{theirs}post_attention_layernorm.weight", (block, "mlp_norm", "scale"), D),
        ]
        if mixer == "attention":
            found += attention_weights(model, f"{theirs}self_attn.", (block, "mixer"))
        else:
            found += delta_weights(model, f"{theirs}linear_attn.", (block, "mixer"))
        if channel == "moe":
            found += moe_weights(model, theirs, (block, "mlp"))
        else:
            found += llama.mlp_weights(model, f"{theirs}mlp.", (block, "mlp"))
    return found


def attention_weights(model: Mapping[str, Any], theirs: str, ours: tuple[str, ...]) -> list[Weight]:
    """The tensors of one attention. Theirs hold query and gate of a head behind one another, head by head."""
    D, (H, _, d) = model["width"], llama.head_sizes(model)
    whole = (f"{theirs}q_proj.weight", (2 * H * d, D))
    two = [
        Weight(*whole, (*ours, name), (D, H, d), turned=True, view=(H, 2, d, D), cut=(slice(None), i))
        for i, name in enumerate(("query", "gate"))
    ]
    return [
        *two,
        *llama.attention_weights(model, theirs, ours)[1:],
        same(f"{theirs}q_norm.weight", (*ours, "query_norm", "scale"), d),
        same(f"{theirs}k_norm.weight", (*ours, "key_norm", "scale"), d),
    ]


def delta_weights(model: Mapping[str, Any], theirs: str, ours: tuple[str, ...]) -> list[Weight]:
    """The tensors of one Gated DeltaNet.

    In theirs the rows of a head of keys and of its heads of values are together: query, key, values and gates in one
    tensor, steps and decays in another.
    """
    D, options = model["width"], model["gated_deltanet"]
    H, G, K, P, W = (options[name] for name in ("heads", "key_heads", "key_dim", "value_dim", "conv"))

    def by_key_heads(name: str, *rows: tuple[str, int, tuple[int, ...]]) -> list[Weight]:
        total, start, found = sum(size for _, size, _ in rows), 0, []
        for path, size, shape in rows:
            cut = (slice(None), slice(start, start + size))
            view = (G, total, D)
            found.append(Weight(f"{theirs}{name}.weight", (G * total, D), (*ours, path), shape, True, view, cut))
            start += size
        return found

    return [
        *by_key_heads(
            "in_proj_qkvz",
            ("q_proj", K, (D, G, K)),
            ("k_proj", K, (D, G, K)),
            ("v_proj", H // G * P, (D, H, P)),
            ("gate_proj", H // G * P, (D, H, P)),
        ),
        *by_key_heads("in_proj_ba", ("beta_proj", H // G, (D, H)), ("dt_proj", H // G, (D, H))),
        *parts(
            f"{theirs}conv1d.weight",
            (1, W),
            ((*ours, "q_conv"), G * K, (W, G * K)),
            ((*ours, "k_conv"), G * K, (W, G * K)),
            ((*ours, "v_conv"), H * P, (W, H * P)),
        ),
        same(f"{theirs}dt_bias", (*ours, "dt_bias"), H),
        same(f"{theirs}A_log", (*ours, "A_log"), H),
        same(f"{theirs}norm.weight", (*ours, "scale"), P),
        turned(f"{theirs}out_proj.weight", (D, H * P), (*ours, "out_proj"), (H, P, D)),
    ]


def moe_weights(model: Mapping[str, Any], theirs: str, ours: tuple[str, ...]) -> list[Weight]:
    """The tensors of a layer's experts and of the shared one."""
    D, F = model["width"], model["moe"]["shared"] * model["moe"]["hidden"]
    shared, gate_up = f"{theirs}mlp.shared_expert", ((*ours, "shared_gate_up"), (D, 2, F))
    halves = [
        Weight(f"{shared}.{name}_proj.weight", (F, D), *gate_up, turned=True, slot=(slice(None), i))
        for i, name in enumerate(("gate", "up"))
    ]
    return [
        *experts.weights(model, NAMES, theirs, ours),
        *halves,
        turned(f"{shared}.down_proj.weight", (D, F), (*ours, "shared_down"), (F, D)),
        turned(f"{shared}_gate.weight", (1, D), (*ours, "shared_gate"), (D, 1)),
    ]


def exported(model: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.model with the sizes that `weights` needs, and the fields of their config.json."""
    blocks = pattern.parse(model["pattern"]) * model["repeats"]
    mixers, channels = ([words[0] for words in steps] for steps in zip(*blocks, strict=True))
    delta = delta_sized(model, params, mixers.index("gated_deltanet"), EXPORTED_GATED_DELTANET, model["norm_eps"])
    sized = {**model, "gated_deltanet": delta}
    fields: dict[str, Any] = dict(num_experts=0)
    if "attention" in mixers:
        sized["attention"] = attention_sized(model, params, mixers.index("attention"), EXPORTED_ATTENTION)
        fields |= _attention_fields(sized["attention"])
    if "mlp" in channels:
        sized["mlp"] = mlp_sized(model, params, channels.index("mlp"))
        fields["intermediate_size"] = sized["mlp"]["hidden"]
    if "moe" in channels:
        sized["moe"] = experts.sized(model, params, f"block_{channels.index('moe')}", EXPORTED_MOE)
        fields |= _moe_fields(sized["moe"])
    fields |= dict(
        model_type="qwen3_next",
        architectures=["Qwen3NextForCausalLM"],
        hidden_act="silu",
        layer_types=[THEIR_MIXERS[mixer] for mixer in mixers],
        mlp_only_layers=[i for i, channel in enumerate(channels) if channel == "mlp"] if "moe" in channels else [],
        rms_norm_eps=model["norm_eps"],
        **delta_fields(delta),
    )
    return sized, fields


def _attention_fields(attention: Mapping[str, Any]) -> dict[str, Any]:
    return dict(
        num_attention_heads=attention["heads"],
        num_key_value_heads=attention["kv_heads"],
        head_dim=attention["head_dim"],
        **gpt_neox.rotary_fields(attention, *ROTARY),
    )


def _moe_fields(moe: Mapping[str, Any]) -> dict[str, Any]:
    if not moe["shared"]:
        raise UserError(f"{MOE.place('shared')} is 0; only 1 and more can be exported, as theirs have a shared expert")
    return dict(
        num_experts=moe["experts"],
        num_experts_per_tok=moe["top_k"],
        moe_intermediate_size=moe["hidden"],
        shared_expert_intermediate_size=moe["shared"] * moe["hidden"],
        norm_topk_prob=moe["router"] == "renormalised",
    )


def delta_fields(delta: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of their config for the sizes of a Gated DeltaNet."""
    return dict(
        linear_num_value_heads=delta["heads"],
        linear_num_key_heads=delta["key_heads"],
        linear_key_head_dim=delta["key_dim"],
        linear_value_head_dim=delta["value_dim"],
        linear_conv_kernel_dim=delta["conv"],
    )


def delta_sized(
    model: Mapping[str, Any], params: Mapping[str, Any], block: int, table: Table, epsilon: float
) -> dict[str, Any]:
    """Every option of our Gated DeltaNet; the sizes come from the parameters of `block`. `epsilon`: what theirs has."""
    options = GATED_DELTANET.complete(model.get("gated_deltanet", {}))
    check_export(options, table, GATED_DELTANET.home)
    if options["norm_eps"] != epsilon:
        problem = f"{GATED_DELTANET.place('norm_eps')} is {options['norm_eps']}"
        raise UserError(f"{problem}; only {epsilon} can be exported with model.norm_eps={model['norm_eps']}")
    mixer = (f"block_{block}", "mixer")
    _, key_heads, key_dim = np.shape(find(params, (*mixer, "q_proj")))
    _, heads, value_dim = np.shape(find(params, (*mixer, "v_proj")))
    return options | dict(heads=heads, key_heads=key_heads, key_dim=key_dim, value_dim=value_dim)


def attention_sized(model: Mapping[str, Any], params: Mapping[str, Any], block: int, table: Table) -> dict[str, Any]:
    """Every option of our attention; the sizes come from the parameters of `block`."""
    options = ATTENTION.complete(model.get("attention", {}))
    check_export(options, table, ATTENTION.home)
    if options["qk_norm_eps"] != model["norm_eps"]:
        problem = f"only model.norm_eps, {model['norm_eps']}, can be exported"
        raise UserError(f"{ATTENTION.place('qk_norm_eps')} is {options['qk_norm_eps']}; {problem}")
    _, heads, head_dim = np.shape(find(params, (f"block_{block}", "mixer", "query")))
    _, kv_heads, _ = np.shape(find(params, (f"block_{block}", "mixer", "key")))
    return options | dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def mlp_sized(model: Mapping[str, Any], params: Mapping[str, Any], block: int) -> dict[str, Any]:
    """Every option of our MLP; the width comes from the parameters of `block`."""
    options = MLP.complete(model.get("mlp", {}))
    check_export(options, EXPORTED_MLP, MLP.home)
    return options | dict(hidden=np.shape(find(params, (f"block_{block}", "mlp", "gate")))[1])
