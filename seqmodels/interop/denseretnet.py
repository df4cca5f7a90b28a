"""Converts weights of DenseRetNet from the code of its authors (arXiv 2403.00818) into ours.

Their checkpoints are called DenseMamba-350M and -1.3B, and their class is called LlamaForCausalLM. In fact they are
DenseRetNets, neither Mamba nor Llama models.
"""

from collections.abc import Mapping

from seqmodels.errors import UserError
from seqmodels.interop.generic import COMMON, FRESH, TRAINING
from seqmodels.interop.table import Honoured, Table, harmless, integer, only, optional, positive, read, refuse
from seqmodels.interop.weights import Weight, head, parts, same, turned

WITNESS = "model.layers.0.self_attn.v_select.fc1.weight"  # a tensor that no other model has
BUFFERS = ("retnet_rel_pos.angle", "retnet_rel_pos.decay")  # follow from the config

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "query_key_dim", "v_factor")
TABLE: Table = {
    **COMMON,
    "dense_block_layers": Honoured(None, integer()),
    "rms_norm_eps": Honoured(1e-6, positive),
    **dict.fromkeys(SIZES, Honoured(None, optional(positive))),
    "tie_word_embeddings": only(False),
    **harmless("the embedding of the published files has one row more", "vocab_size"),
    **harmless(FRESH, "deepnorm"),
    **harmless(TRAINING, "dropout"),
    **harmless("read nowhere in their code", "hidden_act", "layernorm_eps", "max_position_embeddings", "retnorm"),
}


def dense_weights(model: Mapping, layer: int) -> list[Weight]:
    """Gates and norms of a layer's links."""
    D, options, dense = model["width"], model["retnet"], model["dense"]
    H, K, V = options["heads"], options["key_dim"], options["value_dim"]
    theirs, ours = f"model.layers.{layer}.self_attn.", (f"block_{layer}", "dense")
    found = []
    for letter, gate, size, bottleneck in (
        ("k", "state", H * K, dense["bottleneck_state"]),
        ("v", "channel", H * V, dense["bottleneck"]),
    ):
        r = D // bottleneck
        found += [
            turned(f"{theirs}{letter}_select.fc1.weight", (r, D), (*ours, f"gate_{gate}_in"), (D, r)),
            turned(f"{theirs}{letter}_select.fc2.weight", (size, r), (*ours, f"gate_{gate}_out"), (r, 1, size)),
            same(f"{theirs}{letter}_norm.weight", (*ours, f"norm_{gate}", "scale"), size),
        ]
    return found


def weights(model: Mapping) -> list[Weight]:
    """Every tensor of a DenseRetNet, except the links of layer 0, which have no layer below to read."""
    V, D, layers, options = model["vocab_size"], model["width"], model["repeats"], model["retnet"]
    H, K, P = options["heads"], options["key_dim"], options["value_dim"]
    found = [
        same("model.embed_tokens.weight", ("embedding",), V, D),
        same("model.norm.weight", ("final_norm", "scale"), D),
        *head(model),
    ]
    for i in range(layers):
        block, mixer, theirs = (f"block_{i}",), (f"block_{i}", "mixer"), f"model.layers.{i}."
        found += [
            same(f"{theirs}input_layernorm.weight", (*block, "norm", "scale"), D),
            turned(f"{theirs}self_attn.q_proj.weight", (H * K, D), (*mixer, "q_proj"), (D, H, K)),
            turned(f"{theirs}self_attn.k_proj.weight", (H * K, D), (*mixer, "k_proj"), (D, H, K)),
            *parts(
                f"{theirs}self_attn.to_hidden.0.weight",
                (D,),
                ((*mixer, "v_proj"), H * P, (D, H, P)),
                ((*mixer, "gate_proj"), H * P, (D, H, P)),
            ),
            turned(f"{theirs}self_attn.to_out.0.weight", (D, H * P), (*mixer, "out_proj"), (H, P, D)),
            same(f"{theirs}self_attn.group_norm.weight", (*mixer, "scale"), P),
            *(dense_weights(model, i) if i else []),
        ]
    return found


def sizes_of(tensors: Mapping) -> dict[str, int]:
    """Sizes of the model by the names of their config, from the shapes of the tensors."""

    def shape(name):
        if name not in tensors:
            raise UserError(f"DenseRetNet weights: missing {name}")
        return tensors[name].shape

    mixer = "model.layers.0.self_attn."
    vocab_size, width = shape("model.embed_tokens.weight")
    keys, inner = shape(f"{mixer}q_proj.weight")[0], shape(f"{mixer}to_out.0.weight")[1]
    (value_dim,) = shape(f"{mixer}group_norm.weight")
    return dict(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=sum(name.endswith("self_attn.q_proj.weight") for name in tensors),
        num_attention_heads=inner // value_dim,
        query_key_dim=keys,
        v_factor=inner / width,
        bottleneck=width // shape(f"{mixer}v_select.fc1.weight")[0],
        bottleneck_state=width // shape(f"{mixer}k_select.fc1.weight")[0],
    )


def config_of(tensors: Mapping, config: Mapping) -> dict:
    """Fields of config.model. The sizes come from the shapes of the tensors; those in the config must be the same.

    Raises:
        UserError: the config has no `dense_block_layers`, or has values that cannot be converted.
    """
    if "dense_block_layers" not in config:
        raise UserError("DenseRetNet config: the field dense_block_layers, the depth of the links, is missing")
    theirs, sizes = read(config, TABLE, "DenseRetNet"), sizes_of(tensors)
    for name in SIZES:
        if theirs[name] is not None and theirs[name] != sizes[name]:
            refuse(name, theirs[name], f"the tensors have {sizes[name]}")
    width, heads, epsilon = sizes["hidden_size"], sizes["num_attention_heads"], theirs["rms_norm_eps"]
    return dict(
        pattern="retnet",
        width=width,
        repeats=sizes["num_hidden_layers"],
        vocab_size=sizes["vocab_size"],
        norm_eps=epsilon,
        tie_embeddings=False,
        retnet=dict(
            heads=heads,
            key_dim=sizes["query_key_dim"] // heads,
            value_dim=int(sizes["v_factor"] * width) // heads,
            schedule="octaves",
            activation="silu",
            row_scale=True,
            norm_eps=epsilon,
            norm_weight=True,
        ),
        dense=dict(
            variant="input",
            gate="both",
            norm=True,
            norm_eps=epsilon,
            depth=theirs["dense_block_layers"],
            bottleneck=sizes["bottleneck"],
            bottleneck_state=sizes["bottleneck_state"],
        ),
    )


def without_unused(tensors: Mapping, model: Mapping) -> dict:
    """The tensors without buffers and without the links of layer 0."""
    unused = {weight.theirs for weight in dense_weights(model, 0)}
    return {name: t for name, t in tensors.items() if name not in unused and not name.endswith(BUFFERS)}
