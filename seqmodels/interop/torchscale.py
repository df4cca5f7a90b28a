"""Weights of RetNet from the code of its authors (microsoft/torchscale, `RetNetDecoder`) into ours.

The fields are those of its RetNetConfig. A checkpoint of fairseq has the prefix `decoder.`.
"""

from collections.abc import Mapping
from typing import Any

from seqmodels.fields.rules import one_of
from seqmodels.interop.generic import COMMON, ROUNDING, TRAINING
from seqmodels.interop.table import Honoured, Table, flag, harmless, integer, only, positive, refuse
from seqmodels.interop.weights import Weight, same, turned

WITNESS = "layers.0.retention.q_proj.weight"  # a tensor that no other model has
PREFIX = "decoder."
EMBEDDING, HEAD = "embed_tokens.weight", "output_projection.weight"
BUFFERS = ("retnet_rel_pos.angle", "retnet_rel_pos.decay", "version")  # follow from the config; fairseq's note
ACTIVATIONS = {"gelu": "gelu", "swish": "silu", "relu": "relu"}  # theirs and ours

TABLE: Table = {
    **COMMON,
    "decoder_embed_dim": Honoured(768, integer()),
    "decoder_value_embed_dim": Honoured(1280, integer()),
    "decoder_retention_heads": Honoured(3, integer()),
    "decoder_ffn_embed_dim": Honoured(1280, integer()),
    "decoder_layers": Honoured(12, integer()),
    "activation_fn": Honoured("gelu", one_of(*ACTIVATIONS)),
    "layernorm_eps": Honoured(1e-6, positive),
    "layernorm_embedding": Honoured(False, flag),
    "no_scale_embedding": Honoured(True, flag),
    "share_decoder_input_output_embed": Honoured(False, flag),
    "decoder_normalize_before": only(True),
    "deepnorm": only(False),
    "moe_freq": only(0),
    "multiway": only(False),
    "no_output_layer": only(False),
    **harmless("read nowhere in their retention", "max_rel_pos", "rel_pos_buckets", "subln"),
    **harmless("read nowhere in their retention", "xpos_rel_pos", "xpos_scale_base"),
    **harmless("the rows of the embedding are the vocabulary", "vocab_size"),
    **harmless("positions have no end", "max_target_positions"),
    **harmless("read with experts", "moe_eval_capacity_token_fraction", "moe_expert_count", "moe_gating_use_fp32"),
    **harmless("read with experts", "moe_normalize_gate_prob_before_dropping", "moe_second_expert_policy"),
    **harmless("read with experts", "moe_top1_expert", "use_xmoe"),
    **harmless(TRAINING, "activation_dropout", "checkpoint_activations", "dropout", "drop_path_rate"),
    **harmless(TRAINING, "ddp_rank", "fsdp"),
    # another form of the same sum; but for the epsilon of the norm behind it
    **harmless(ROUNDING, "chunkwise_recurrent", "recurrent_chunk_size"),
}


def without_prefix(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors under the names of a RetNetDecoder, without buffers."""
    named = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in named.items() if name not in BUFFERS}


def config_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.model for the honoured fields of their config, whose `vocab_size` is that of the embedding."""
    width, heads, values = (theirs[f"decoder_{name}"] for name in ("embed_dim", "retention_heads", "value_embed_dim"))
    if width % (2 * heads):
        refuse("decoder_embed_dim", width, f"allowed: a multiple of 2 decoder_retention_heads={2 * heads}")
    if values % heads:
        refuse("decoder_value_embed_dim", values, f"allowed: a multiple of decoder_retention_heads={heads}")
    return dict(
        pattern="retnet+mlp",
        width=width,
        repeats=theirs["decoder_layers"],
        vocab_size=theirs["vocab_size"],
        norm_eps=theirs["layernorm_eps"],
        embedding_norm=theirs["layernorm_embedding"],
        embedding_scale=1.0 if theirs["no_scale_embedding"] else width**0.5,
        tie_embeddings=theirs["share_decoder_input_output_embed"],
        retnet=dict(
            heads=heads,
            key_dim=width // heads,
            value_dim=values // heads,
            schedule="octaves",
            angles="retnet",
            row_scale=True,
            norm_eps=theirs["layernorm_eps"],
        ),
        mlp=dict(hidden=theirs["decoder_ffn_embed_dim"], activation=ACTIVATIONS[theirs["activation_fn"]]),
    )


def weights(model: Mapping[str, Any]) -> list[Weight]:
    """Every tensor of a RetNetDecoder but the head."""
    V, D, F, options = model["vocab_size"], model["width"], model["mlp"]["hidden"], model["retnet"]
    H, K, P = (options[name] for name in ("heads", "key_dim", "value_dim"))
    found = [
        same(EMBEDDING, ("embedding",), V, D),
        *([same("layernorm_embedding.weight", ("embedding_norm", "scale"), D)] if model["embedding_norm"] else []),
        same("layer_norm.weight", ("final_norm", "scale"), D),
    ]
    for i in range(model["repeats"]):
        block, mixer, mlp = (f"block_{i}",), (f"block_{i}", "mixer"), (f"block_{i}", "mlp")
        theirs = f"layers.{i}."
        found += [
            same(f"{theirs}retention_layer_norm.weight", (*block, "norm", "scale"), D),
            turned(f"{theirs}retention.q_proj.weight", (H * K, D), (*mixer, "q_proj"), (D, H, K)),
            turned(f"{theirs}retention.k_proj.weight", (H * K, D), (*mixer, "k_proj"), (D, H, K)),
            turned(f"{theirs}retention.v_proj.weight", (H * P, D), (*mixer, "v_proj"), (D, H, P)),
            turned(f"{theirs}retention.g_proj.weight", (H * P, D), (*mixer, "gate_proj"), (D, H, P)),
            turned(f"{theirs}retention.out_proj.weight", (D, H * P), (*mixer, "out_proj"), (H, P, D)),
            same(f"{theirs}final_layer_norm.weight", (*block, "mlp_norm", "scale"), D),
            turned(f"{theirs}ffn.fc1.weight", (F, D), (*mlp, "gate"), (D, F)),
            turned(f"{theirs}ffn.gate.weight", (F, D), (*mlp, "up"), (D, F)),
            turned(f"{theirs}ffn.fc2.weight", (D, F), (*mlp, "down"), (F, D)),
        ]
    return found
