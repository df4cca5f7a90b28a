"""Converts weights of DenseRetNet from the code of its authors (arXiv 2403.00818) into ours.

Their checkpoints are called DenseMamba-350M and -1.3B, and their class is called LlamaForCausalLM. In fact they are
DenseRetNets, neither Mamba nor Llama models.
"""

from collections.abc import Mapping

from seqmodels.errors import UserError
from seqmodels.interop.weights import Weight, parts, same, turned

WITNESS = "model.layers.0.self_attn.v_select.fc1.weight"  # a tensor that no other model has
BUFFERS = ("retnet_rel_pos.angle", "retnet_rel_pos.decay")  # follow from the config


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
        turned("lm_head.weight", (V, D), ("head",), (D, V)),
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


def config_of(tensors: Mapping, config: Mapping) -> dict:
    """Fields of config.model. All sizes come from the tensors' shapes; the depth of the links comes from the config.

    Raises:
        UserError: the config has no `dense_block_layers`.
    """
    if "dense_block_layers" not in config:
        raise UserError("DenseRetNet config: the field dense_block_layers, the depth of the links, is missing")

    def shape(name):
        if name not in tensors:
            raise UserError(f"DenseRetNet weights: missing {name}")
        return tensors[name].shape

    mixer = "model.layers.0.self_attn."
    vocab_size, width = shape("model.embed_tokens.weight")
    keys, inner = shape(f"{mixer}q_proj.weight")[0], shape(f"{mixer}to_out.0.weight")[1]
    (value_dim,) = shape(f"{mixer}group_norm.weight")
    heads = inner // value_dim
    return dict(
        pattern="retnet",
        width=width,
        repeats=sum(name.endswith("self_attn.q_proj.weight") for name in tensors),
        vocab_size=vocab_size,
        norm_eps=1e-6,
        tie_embeddings=False,
        retnet=dict(
            heads=heads,
            key_dim=keys // heads,
            value_dim=value_dim,
            schedule="octaves",
            activation="silu",
            row_scale=True,
            norm_eps=1e-6,
            norm_weight=True,
        ),
        dense=dict(
            variant="input",
            gate="both",
            norm=True,
            norm_eps=1e-6,
            depth=config["dense_block_layers"],
            bottleneck=width // shape(f"{mixer}v_select.fc1.weight")[0],
            bottleneck_state=width // shape(f"{mixer}k_select.fc1.weight")[0],
        ),
    )


def without_unused(tensors: Mapping, model: Mapping) -> dict:
    """The tensors without buffers and without the links of layer 0."""
    unused = {weight.theirs for weight in dense_weights(model, 0)}
    return {name: t for name, t in tensors.items() if name not in unused and not name.endswith(BUFFERS)}
