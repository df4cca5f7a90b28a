"""Fields, names and layouts of Mixtral models of transformers."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from seqmodels.fields.attention import ATTENTION
from seqmodels.interop import experts, llama
from seqmodels.interop.generic import sizes
from seqmodels.interop.table import Honoured, Table, check_export, harmless, integer, only, optional, positive, refuse
from seqmodels.interop.weights import Weight, find, same

NAMES = experts.Names(prefix="block_sparse_moe.", router="gate", gate="w1", up="w3", down="w2")

MIXTRAL: Table = {
    **llama.ATTENTION_AND_MLP,
    **experts.ROUTING,
    **sizes(vocab_size=32000, width=4096, layers=32, tied=False),
    "intermediate_size": Honoured(14336, integer()),
    "num_key_value_heads": Honoured(8, optional(integer())),
    "rms_norm_eps": Honoured(1e-5, positive),
    "rope_theta": Honoured(1e6, positive),
    "num_local_experts": Honoured(8, integer()),
    "num_experts_per_tok": Honoured(2, integer()),
    "sliding_window": Honoured(None, optional(integer())),
    "layer_types": only(None),
    **harmless("their class has no biases", "attention_bias", "mlp_bias"),
}
EXPORTED_MOE: Table = {**experts.EXPORTED, "router": only("renormalised")}


def config_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.model for the honoured fields of a Mixtral config."""
    experts.check_top_k(theirs, "num_local_experts")
    if theirs["num_experts_per_tok"] == 1 < theirs["num_local_experts"]:
        refuse("num_experts_per_tok", 1, "only 2 and more can be converted: the weight of a single expert is always 1")
    return dict(
        pattern="attention+moe",
        width=theirs["hidden_size"],
        repeats=theirs["num_hidden_layers"],
        vocab_size=theirs["vocab_size"],
        norm_eps=theirs["rms_norm_eps"],
        tie_embeddings=theirs["tie_word_embeddings"],
        attention=dict(
            **llama.heads_of(theirs),
            **llama.rotary_of(theirs),
            window=theirs["sliding_window"] or 0,
        ),
        moe=dict(
            experts=theirs["num_local_experts"],
            top_k=theirs["num_experts_per_tok"],
            hidden=theirs["intermediate_size"],
            router="renormalised",
        ),
    )


def as_in_files(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under the names of files; those of a model in memory have others."""
    return experts.per_expert(tensors, NAMES, fused="mlp.")


def weights(model: Mapping[str, Any]) -> list[Weight]:
    """Every tensor of a Mixtral model."""
    V, D = model["vocab_size"], model["width"]
    found = [
        same("model.embed_tokens.weight", ("embedding",), V, D),
        same("model.norm.weight", ("final_norm", "scale"), D),
    ]
    for i in range(model["repeats"]):
        block, theirs = f"block_{i}", f"model.layers.{i}."
        found += [
            same(f"{theirs}input_layernorm.weight", (block, "norm", "scale"), D),
            *llama.attention_weights(model, f"{theirs}self_attn.", (block, "mixer")),
            same(f"{theirs}post_attention_layernorm.weight", (block, "mlp_norm", "scale"), D),
            *experts.weights(model, NAMES, theirs, (block, "mlp")),
        ]
    return found


def exported(model: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.model with the sizes that `weights` needs, and the fields of their config.json."""
    attention = ATTENTION.complete(model.get("attention", {}))
    check_export(attention, llama.EXPORTED_ATTENTION, ATTENTION.home)
    moe = experts.sized(model, params, "block_0", EXPORTED_MOE)
    _, heads, head_dim = np.shape(find(params, ("block_0", "mixer", "query")))
    _, kv_heads, _ = np.shape(find(params, ("block_0", "mixer", "key")))
    attention |= dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    fields = dict(
        model_type="mixtral",
        architectures=["MixtralForCausalLM"],
        intermediate_size=moe["hidden"],
        hidden_act="silu",
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=model["norm_eps"],
        **llama.rotary_fields(attention),
        sliding_window=attention["window"] or None,
        num_local_experts=moe["experts"],
        num_experts_per_tok=moe["top_k"],
    )
    return {**model, "attention": attention, "moe": moe}, fields
