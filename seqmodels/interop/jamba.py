"""Fields, names and layouts of Jamba models of transformers: Mamba, attention, MLPs and experts in one stack."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from seqmodels import pattern
from seqmodels.errors import UserError
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.mamba import MAMBA
from seqmodels.fields.mlp import MLP
from seqmodels.fields.moe import MOE
from seqmodels.interop import experts, llama, mamba
from seqmodels.interop.generic import COMMON, FRESH, ROUNDING, TRAINING, check_layers, repeated, sizes
from seqmodels.interop.table import (
    Honoured,
    Table,
    check_export,
    harmless,
    honoured,
    integer,
    only,
    optional,
    positive,
    refuse,
)
from seqmodels.interop.weights import Weight, find, same

NAMES = experts.Names(prefix="feed_forward.", router="router", gate="gate_proj", up="up_proj", down="down_proj")

JAMBA: Table = {
    **COMMON,
    **experts.ROUTING,
    **sizes(vocab_size=65536, width=4096, layers=32, tied=False),
    "intermediate_size": Honoured(14336, integer()),
    "num_attention_heads": Honoured(32, integer()),
    "num_key_value_heads": Honoured(8, optional(integer())),
    "head_dim": Honoured(None, optional(integer())),
    "rms_norm_eps": Honoured(1e-6, positive),
    "num_experts": Honoured(16, integer()),
    "num_experts_per_tok": Honoured(2, integer()),
    "expert_layer_period": Honoured(2, integer()),
    "expert_layer_offset": Honoured(1, integer(0)),
    "attn_layer_period": Honoured(8, integer()),
    "attn_layer_offset": Honoured(4, integer(0)),
    "mamba_d_state": Honoured(16, integer()),
    "mamba_d_conv": Honoured(4, integer(2, 8)),
    "mamba_expand": Honoured(2, integer()),
    "mamba_dt_rank": Honoured("auto", mamba.RANK),
    "mamba_conv_bias": only(True),
    "mamba_proj_bias": only(False),
    **harmless(TRAINING, "attention_dropout"),
    **harmless(ROUNDING, "use_associative_scan", "use_mamba_kernels", "use_mambapy"),
    **harmless("their attention has no positions", "max_position_embeddings"),
    **harmless("their attention reads it in no call", "sliding_window"),
    **harmless("how many logits a call returns in transformers 4", "num_logits_to_keep"),
}

EXPORTED_ATTENTION: Table = {
    **llama.PLAIN_ATTENTION,
    **honoured("heads", "kv_heads", "head_dim"),
    "positions": only("none"),
    **llama.UNSCALED,
    "window": only(0),
    **harmless("read with positions='rope'", "rope_theta", "rotary"),
}
EXPORTED_MAMBA: Table = {
    **honoured("state", "expand", "conv", "dt_rank", "norm_eps"),
    "norms": only("learned"),
    **harmless(FRESH, "dt_min", "dt_max", "dt_floor"),
    "dt_scale": only(1.0),
}
EXPORTED_MLP: Table = {**honoured("hidden"), "activation": only("silu"), "gated": only(True)}
EXPORTED_MOE: Table = {**experts.EXPORTED, "router": only("softmax")}


def config_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.model for the honoured fields of a Jamba config."""
    if theirs["num_experts"] > 1:
        experts.check_top_k(theirs, "num_experts")
    text, repeats = pattern_of(theirs)
    rank, epsilon = theirs["mamba_dt_rank"], theirs["rms_norm_eps"]
    model = dict(
        pattern=text,
        width=theirs["hidden_size"],
        repeats=repeats,
        vocab_size=theirs["vocab_size"],
        norm_eps=epsilon,
        tie_embeddings=theirs["tie_word_embeddings"],
        attention=dict(**llama.heads_of(theirs, rotary=False), positions="none"),
        mamba=dict(
            state=theirs["mamba_d_state"],
            expand=theirs["mamba_expand"],
            conv=theirs["mamba_d_conv"],
            dt_rank=0 if rank == "auto" else rank,
            norms="learned",
            norm_eps=epsilon,
        ),
        mlp=dict(hidden=theirs["intermediate_size"]),
    )
    if theirs["num_experts"] > 1:
        sizes = dict(experts=theirs["num_experts"], top_k=theirs["num_experts_per_tok"])
        model["moe"] = dict(**sizes, hidden=theirs["intermediate_size"], router="softmax")
    return model


def pattern_of(theirs: Mapping[str, Any]) -> tuple[str, int]:
    """model.pattern and model.repeats: the shortest group of layers that is repeated.

    Raises:
        UserError: an offset that is not below its period, or more layers than a model of ours can have.
    """
    check_layers(theirs)
    for name in ("attn_layer", "expert_layer"):
        period, offset = theirs[f"{name}_period"], theirs[f"{name}_offset"]
        if offset >= period:
            refuse(f"{name}_offset", offset, f"allowed: below {name}_period={period}")
    mixers = ("attention" if chosen else "mamba" for chosen in _every(theirs, "attn_layer"))
    moe = "moe" if theirs["num_experts"] > 1 else "mlp"
    channels = (moe if chosen else "mlp" for chosen in _every(theirs, "expert_layer"))
    blocks = [f"{mixer}+{channel}" for mixer, channel in zip(mixers, channels, strict=True)]
    return repeated(blocks)


def _every(theirs: Mapping[str, Any], name: str) -> list[bool]:
    """Whether each layer is one of those that `name`_period and `name`_offset choose."""
    period, offset = theirs[f"{name}_period"], theirs[f"{name}_offset"]
    return [i % period == offset for i in range(theirs["num_hidden_layers"])]


def as_in_files(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under the names of files; the experts of a model in memory have others."""
    return experts.per_expert(tensors, NAMES, fused="feed_forward.")


def blocks_of(model: Mapping[str, Any]) -> list[pattern.Block]:
    """Every block of a model of ours."""
    return pattern.parse(model["pattern"]) * model["repeats"]


def weights(model: Mapping[str, Any]) -> list[Weight]:
    """Every tensor of a Jamba model."""
    V, D = model["vocab_size"], model["width"]
    found = [
        same("model.embed_tokens.weight", ("embedding",), V, D),
        same("model.final_layernorm.weight", ("final_norm", "scale"), D),
    ]
    for i, ((mixer,), (channel,)) in enumerate(blocks_of(model)):
        block, theirs = f"block_{i}", f"model.layers.{i}."
        found += [
            same(f"{theirs}input_layernorm.weight", (block, "norm", "scale"), D),
            same(f"{theirs}pre_ff_layernorm.weight", (block, "mlp_norm", "scale"), D),
        ]
        if mixer == "attention":
            found += llama.attention_weights(model, f"{theirs}self_attn.", (block, "mixer"))
        else:
            found += mamba_weights(model, f"{theirs}mamba.", (block, "mixer"))
        if channel == "moe":
            found += experts.weights(model, NAMES, theirs, (block, "mlp"))
        else:
            found += llama.mlp_weights(model, f"{theirs}feed_forward.", (block, "mlp"))
    return found


def mamba_weights(model: Mapping[str, Any], theirs: str, ours: tuple[str, ...]) -> list[Weight]:
    """Every tensor of one Mamba with learned norms, from their prefix to our path."""
    _, N, _, R = mamba.mixer_sizes(model)
    return [
        *mamba.mixer_weights(model, theirs, ours),
        same(f"{theirs}dt_layernorm.weight", (*ours, "delta_norm"), R),
        same(f"{theirs}b_layernorm.weight", (*ours, "B_norm"), N),
        same(f"{theirs}c_layernorm.weight", (*ours, "C_norm"), N),
    ]


def exported(model: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.model with the sizes that `weights` needs, and the fields of their config.json."""
    blocks = blocks_of(model)
    places = {word: [block[step] == (word,) for block in blocks] for word, step in STEPS.items()}
    model = _sized(model, params, {word: flags.index(True) for word, flags in places.items() if any(flags)})
    fields = dict(
        model_type="jamba",
        architectures=["JambaForCausalLM"],
        hidden_act="silu",
        rms_norm_eps=model["norm_eps"],
        num_experts=1,
        **_period("attn_layer", places["attention"], model),
        **_period("expert_layer", places["moe"], model),
        **_mamba_fields(model),
    )
    if any(places["attention"]):
        heads, kv_heads, head_dim = llama.head_sizes(model)
        fields |= dict(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)
    else:
        # no layer has the heads, and their cache cannot be without attention
        fields |= dict(num_attention_heads=1, num_key_value_heads=1, use_cache=False)
    if any(places["moe"]):
        moe, mlp = model["moe"], model["mlp"]
        if any(places["mlp"]) and moe["hidden"] != mlp["hidden"]:
            problem = f"only model.mlp.hidden, {mlp['hidden']}, can be exported, as theirs have one width"
            raise UserError(f"{MOE.place('hidden')} is {moe['hidden']}; {problem}")
        fields |= dict(num_experts=moe["experts"], num_experts_per_tok=moe["top_k"])
    fields["intermediate_size"] = model["moe" if any(places["moe"]) else "mlp"]["hidden"]
    return model, fields


STEPS = {"attention": 0, "mamba": 0, "mlp": 1, "moe": 1}  # where in a block each branch stands


def _sized(model: Mapping[str, Any], params: Mapping[str, Any], first: Mapping[str, int]) -> dict[str, Any]:
    """config.model with the options of every branch; the sizes come from the parameters of its `first` block."""
    found = {**model, "mamba": MAMBA.complete(model.get("mamba", {}))}
    if "mamba" in first:
        _check_mamba(found["mamba"], model["norm_eps"])
    if "attention" in first:
        attention = ATTENTION.complete(model.get("attention", {}))
        check_export(attention, EXPORTED_ATTENTION, ATTENTION.home)
        mixer = (f"block_{first['attention']}", "mixer")
        _, heads, head_dim = np.shape(find(params, (*mixer, "query")))
        _, kv_heads, _ = np.shape(find(params, (*mixer, "key")))
        found["attention"] = attention | dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    if "mlp" in first:
        mlp = MLP.complete(model.get("mlp", {}))
        check_export(mlp, EXPORTED_MLP, MLP.home)
        found["mlp"] = mlp | dict(hidden=np.shape(find(params, (f"block_{first['mlp']}", "mlp", "gate")))[1])
    if "moe" in first:
        found["moe"] = experts.sized(model, params, f"block_{first['moe']}", EXPORTED_MOE)
    return found


def _check_mamba(options: Mapping[str, Any], epsilon: float) -> None:
    check_export(options, EXPORTED_MAMBA, MAMBA.home)
    if options["norm_eps"] != epsilon:
        problem = f"only model.norm_eps, {epsilon}, can be exported"
        raise UserError(f"{MAMBA.place('norm_eps')} is {options['norm_eps']}; {problem}")


def _mamba_fields(model: Mapping[str, Any]) -> dict[str, Any]:
    _, N, W, R = mamba.mixer_sizes(model)
    sizes = dict(mamba_d_state=N, mamba_d_conv=W, mamba_expand=model["mamba"]["expand"], mamba_dt_rank=R)
    return dict(**sizes, mamba_conv_bias=True, mamba_proj_bias=False)


def _period(name: str, chosen: Sequence[bool], model: Mapping[str, Any]) -> dict[str, int]:
    """`name`_period and `name`_offset, which choose these layers.

    Raises:
        UserError: none do.
    """
    layers = len(chosen)
    if not any(chosen):
        return {f"{name}_period": layers + 1, f"{name}_offset": layers}
    offset = chosen.index(True)
    rest = chosen[offset + 1 :]
    period = rest.index(True) + 1 if any(rest) else layers
    if offset >= period or list(chosen) != [i % period == offset for i in range(layers)]:
        allowed = "only attention, and experts, in one of every so many layers can be exported"
        raise UserError(f"model.pattern is {model['pattern']!r}; {allowed}")
    return {f"{name}_period": period, f"{name}_offset": offset}
