"""Fields, names and layouts of RetNet models of flash-linear-attention (fla), whose `model_type` is `retnet`.

transformers reads them where fla is installed. Their rotations turn channels i and i + K/2 of a head together, ours the
neighbours 2i and 2i + 1: the rows of the matrices of queries and keys are in another order.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from seqmodels.errors import UserError
from seqmodels.fields.mlp import MLP
from seqmodels.fields.retnet import RETNET as OURS
from seqmodels.interop import llama
from seqmodels.interop.generic import COMMON, ROUNDING, TRAINING, check_layers, sizes
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

EMBEDDING = "model.embeddings.weight"
MULTIPLE = 256  # of which their MLP's width is one, if no field gives it

RETNET: Table = {
    **COMMON,
    **sizes(vocab_size=32000, width=2048, layers=24, tied=False),
    "num_heads": Honoured(8, integer()),
    "expand_k": Honoured(1.0, positive),
    "expand_v": Honoured(2.0, positive),
    "hidden_ratio": Honoured(2, optional(positive)),
    "intermediate_size": Honoured(None, optional(integer())),
    "norm_eps": Honoured(1e-6, positive),
    "elementwise_affine": Honoured(True, optional(flag)),
    "num_kv_heads": only(None),
    "feature_map": only(None),
    "hidden_act": only("swish"),
    "use_short_conv": only(False),
    "use_output_gate": only(True),
    "attn": only(None),
    "attnres_block_size": only(None),
    **harmless("read with use_short_conv", "conv_size"),
    **harmless(ROUNDING, "attn_mode", "fuse_norm", "fuse_swiglu"),
    **harmless(TRAINING, "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp"),
    **harmless("their rotary positions have no end", "max_position_embeddings"),
}
EXPORTED_RETNET: Table = {
    **honoured("heads", "key_dim", "value_dim", "norm_weight"),
    **honoured("norm_eps"),  # `exported` compares it with model.norm_eps
    "schedule": only("octaves"),
    "angles": only("rope"),
    "activation": only("identity"),
    "row_scale": only(False),
    **harmless("for fresh weights", "init_std"),
}
EXPORTED_MLP: Table = {**honoured("hidden"), "activation": only("silu"), "gated": only(True)}


def config_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.model for the honoured fields of a RetNet config."""
    check_layers(theirs)
    width, heads, epsilon = theirs["hidden_size"], theirs["num_heads"], theirs["norm_eps"]
    key_dim, value_dim = (_of_a_head(theirs, name) for name in ("expand_k", "expand_v"))
    if key_dim % 2:
        refuse("expand_k", theirs["expand_k"], f"a head has {key_dim} channels of keys; allowed: an even number")
    hidden = theirs["intermediate_size"]
    if hidden is None:
        ratio = 4 if theirs["hidden_ratio"] is None else theirs["hidden_ratio"]
        hidden = -(-int(width * ratio * 2 / 3) // MULTIPLE) * MULTIPLE
    return dict(
        pattern="retnet+mlp",
        width=width,
        repeats=theirs["num_hidden_layers"],
        vocab_size=theirs["vocab_size"],
        norm_eps=epsilon,
        tie_embeddings=theirs["tie_word_embeddings"],
        retnet=dict(
            heads=heads,
            key_dim=key_dim,
            value_dim=value_dim,
            schedule="octaves",
            angles="rope",
            row_scale=False,
            norm_eps=epsilon,
            norm_weight=bool(theirs["elementwise_affine"]),
        ),
        mlp=dict(hidden=hidden),
    )


def _of_a_head(theirs: Mapping[str, Any], name: str) -> int:
    """Channels of a head's keys or values, from the field that says how often the width they are."""
    total, heads = int(theirs["hidden_size"] * theirs[name]), theirs["num_heads"]
    if not total or total % heads:
        refuse(name, theirs[name], f"hidden_size times it is {total}; allowed: a multiple of num_heads={heads}")
    return total // heads


def as_in_files(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors under the names of a model whose norm and gate are fused (`fuse_norm`)."""
    return {name.replace(".attn.g_norm.", ".attn.g_norm_swish_gate."): tensor for name, tensor in tensors.items()}


def weights(model: Mapping[str, Any]) -> list[Weight]:
    """Every tensor of a RetNet model."""
    V, D = model["vocab_size"], model["width"]
    found = [same(EMBEDDING, ("embedding",), V, D), same("model.norm.weight", ("final_norm", "scale"), D)]
    for i in range(model["repeats"]):
        block, theirs = f"block_{i}", f"model.layers.{i}."
        found += [
            same(f"{theirs}attn_norm.weight", (block, "norm", "scale"), D),
            *retention_weights(model, f"{theirs}attn.", (block, "mixer")),
            same(f"{theirs}mlp_norm.weight", (block, "mlp_norm", "scale"), D),
            *llama.mlp_weights(model, f"{theirs}mlp.", (block, "mlp")),
        ]
    return found


def retention_weights(model: Mapping[str, Any], theirs: str, ours: tuple[str, ...]) -> list[Weight]:
    """The tensors of one retention, from their prefix to our path."""
    D, options = model["width"], model["retnet"]
    H, K, P = (options[name] for name in ("heads", "key_dim", "value_dim"))
    return [
        *pairs(f"{theirs}q_proj.weight", (*ours, "q_proj"), D, H, K),
        *pairs(f"{theirs}k_proj.weight", (*ours, "k_proj"), D, H, K),
        turned(f"{theirs}v_proj.weight", (H * P, D), (*ours, "v_proj"), (D, H, P)),
        turned(f"{theirs}g_proj.weight", (H * P, D), (*ours, "gate_proj"), (D, H, P)),
        turned(f"{theirs}o_proj.weight", (D, H * P), (*ours, "out_proj"), (H, P, D)),
        *([same(f"{theirs}g_norm_swish_gate.weight", (*ours, "scale"), P)] if options["norm_weight"] else []),
    ]


def pairs(theirs: str, ours: tuple[str, ...], D: int, H: int, K: int) -> list[Weight]:
    """A matrix [H K, D] of keys: the first half of a head's rows are our even channels, the second our odd ones."""
    every = slice(None)
    return [
        Weight(
            theirs,
            (H * K, D),
            ours,
            (D, H, K),
            turned=True,
            view=(H, 2, K // 2, D),
            cut=(every, half),
            slot=(every, every, slice(half, None, 2)),
        )
        for half in range(2)
    ]


def exported(model: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.model with the sizes that `weights` needs, and the fields of their config.json."""
    options, mlp = (group.complete(model.get(group.name, {})) for group in (OURS, MLP))
    check_export(options, EXPORTED_RETNET, OURS.home)
    check_export(mlp, EXPORTED_MLP, MLP.home)
    if options["norm_eps"] != model["norm_eps"]:
        problem = f"only model.norm_eps, {model['norm_eps']}, can be exported"
        raise UserError(f"{OURS.place('norm_eps')} is {options['norm_eps']}; {problem}")
    D, H, K = np.shape(find(params, ("block_0", "mixer", "q_proj")))
    P = np.shape(find(params, ("block_0", "mixer", "v_proj")))[2]
    hidden = np.shape(find(params, ("block_0", "mlp", "gate")))[1]
    for name, size in (("key_dim", K), ("value_dim", P)):
        if int(D * (H * size / D)) != H * size:  # they round it down
            problem = f"the {H} heads have {H * size} channels, which no factor of model.width={D} gives in fla"
            raise UserError(f"{OURS.place(name)} is {size}; {problem}")
    fields = dict(
        model_type="retnet",
        architectures=["RetNetForCausalLM"],
        hidden_act="swish",
        num_heads=H,
        expand_k=H * K / D,
        expand_v=H * P / D,
        intermediate_size=hidden,
        norm_eps=model["norm_eps"],
        elementwise_affine=options["norm_weight"],
    )
    sized = options | dict(heads=H, key_dim=K, value_dim=P)
    return {**model, "retnet": sized, "mlp": mlp | dict(hidden=hidden)}, fields
