"""Fields, names and layouts of RWKV-4 models of transformers."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from seqmodels.fields.rwkv import RWKV as TIME_MIX
from seqmodels.fields.rwkv_channel import RWKV_CHANNEL as CHANNEL_MIX
from seqmodels.interop.generic import COMMON, sizes
from seqmodels.interop.gpt_neox import norm_weights
from seqmodels.interop.table import Honoured, Table, check_export, harmless, honoured, integer, only, optional
from seqmodels.interop.weights import Weight, find, same, turned

PATTERN = "rwkv+rwkv_channel"
EMBEDDING, HEAD = "rwkv.embeddings.weight", "head.weight"

RWKV: Table = {
    **COMMON,
    **sizes(vocab_size=50277, width=4096, layers=32, tied=False),
    "attention_hidden_size": Honoured(None, optional(integer())),
    "intermediate_size": Honoured(None, optional(integer())),
    "layer_norm_epsilon": only(1e-5),  # their last norm has this one always
    **harmless("bounds what one call of a kernel for CUDA takes", "context_length", "max_position_embeddings"),
    **harmless(
        "for inference in float16: halves the stream after so many blocks, and what is added to it", "rescale_every"
    ),
}
EXPORTED: Table = {
    "norm": only("layer"),
    "norm_eps": only(1e-5),
    "bias": only(True),
    "embedding_norm": only(True),
}
EXPORTED_MIX: Table = honoured("hidden")


def config_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.model for the honoured fields of an RWKV-4 config."""
    return dict(
        pattern=PATTERN,
        width=theirs["hidden_size"],
        repeats=theirs["num_hidden_layers"],
        vocab_size=theirs["vocab_size"],
        norm="layer",
        norm_eps=1e-5,
        bias=True,
        embedding_norm=True,
        tie_embeddings=theirs["tie_word_embeddings"],
        rwkv=dict(hidden=theirs["attention_hidden_size"] or theirs["hidden_size"]),
        rwkv_channel=dict(hidden=theirs["intermediate_size"] or 4 * theirs["hidden_size"]),
    )


def weights(model: Mapping[str, Any]) -> list[Weight]:
    """Every tensor of an RWKV-4 model."""
    V, D = model["vocab_size"], model["width"]
    found = [
        same(EMBEDDING, ("embedding",), V, D),
        *norm_weights("rwkv.blocks.0.pre_ln.", ("embedding_norm",), D),
        *norm_weights("rwkv.ln_out.", ("final_norm",), D),
    ]
    for i in range(model["repeats"]):
        theirs, block = f"rwkv.blocks.{i}.", f"block_{i}"
        found += [
            *norm_weights(f"{theirs}ln1.", (block, "norm"), D),
            *time_mix_weights(model, f"{theirs}attention.", (block, "mixer")),
            *norm_weights(f"{theirs}ln2.", (block, "mlp_norm"), D),
            *channel_mix_weights(model, f"{theirs}feed_forward.", (block, "mlp")),
        ]
    return found


def time_mix_weights(model: Mapping[str, Any], theirs: str, ours: tuple[str, ...]) -> list[Weight]:
    """The tensors of one time mix, from their prefix to our path."""
    D, E = model["width"], model["rwkv"]["hidden"]
    names = ("key", "value", "receptance")
    return [
        *shares(theirs, ours, D, *names),
        *(turned(f"{theirs}{name}.weight", (E, D), (*ours, f"{name}_proj"), (D, E)) for name in names),
        same(f"{theirs}time_decay", (*ours, "decay"), E),
        same(f"{theirs}time_first", (*ours, "bonus"), E),
        turned(f"{theirs}output.weight", (D, E), (*ours, "out_proj"), (E, D)),
    ]


def shares(theirs: str, ours: tuple[str, ...], width: int, *names: str) -> list[Weight]:
    """What each projection has of a token, and not of the one before."""
    return [Weight(f"{theirs}time_mix_{x}", (1, 1, width), (*ours, f"mix_{x}"), (width,)) for x in names]


def channel_mix_weights(model: Mapping[str, Any], theirs: str, ours: tuple[str, ...]) -> list[Weight]:
    """The tensors of one channel mix, from their prefix to our path."""
    D, F = model["width"], model["rwkv_channel"]["hidden"]
    return [
        *shares(theirs, ours, D, "key", "receptance"),
        turned(f"{theirs}key.weight", (F, D), (*ours, "key_proj"), (D, F)),
        turned(f"{theirs}receptance.weight", (D, D), (*ours, "receptance_proj"), (D, D)),
        turned(f"{theirs}value.weight", (D, F), (*ours, "value_proj"), (F, D)),
    ]


def exported(model: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.model with the sizes that `weights` needs, and the fields of their config.json."""
    for group in (TIME_MIX, CHANNEL_MIX):
        check_export(group.complete(model.get(group.name, {})), EXPORTED_MIX, group.home)
    _, inner = np.shape(find(params, ("block_0", "mixer", "key_proj")))
    _, hidden = np.shape(find(params, ("block_0", "mlp", "key_proj")))
    fields = dict(
        model_type="rwkv",
        architectures=["RwkvForCausalLM"],
        attention_hidden_size=inner,
        intermediate_size=hidden,
        layer_norm_epsilon=model["norm_eps"],
    )
    return {**model, "rwkv": dict(hidden=inner), "rwkv_channel": dict(hidden=hidden)}, fields
