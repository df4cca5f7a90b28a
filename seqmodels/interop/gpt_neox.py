"""Fields, names and layouts of GPT-NeoX models of transformers, such as Pythia."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from seqmodels import pattern
from seqmodels.errors import UserError
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.mlp import MLP
from seqmodels.fields.rules import Rule, one_of
from seqmodels.interop import llama
from seqmodels.interop.generic import COMMON, TRAINING, sizes
from seqmodels.interop.table import (
    Honoured,
    Table,
    check_export,
    flag,
    harmless,
    honoured,
    integer,
    only,
    positive,
    refuse,
)
from seqmodels.interop.weights import Weight, find, same, turned

SHARE = Rule(lambda value: positive.test(value) and value <= 1, "a number greater than 0 and at most 1")

GPT_NEOX: Table = {
    **COMMON,
    **sizes(vocab_size=50432, width=6144, layers=44, tied=False),
    "num_attention_heads": Honoured(64, integer()),
    "intermediate_size": Honoured(24576, integer()),
    "hidden_act": Honoured("gelu", one_of(*llama.ACTIVATIONS)),
    "layer_norm_eps": Honoured(1e-5, positive),
    "use_parallel_residual": Honoured(True, flag),
    **llama.ROTARIES,
    "rotary_emb_base": Honoured(1e4, positive),
    "rotary_pct": Honoured(0.25, SHARE),
    "layer_types": Honoured(None, llama.FULL),
    "attention_bias": only(True),  # the MLP has biases always
    "is_causal": only(True),
    "attention_chunk_size": only(None),
    "head_dim": only(None),
    **harmless(TRAINING, "attention_dropout", "hidden_dropout", "classifier_dropout"),
    **harmless("default rotary positions have no end", "max_position_embeddings"),
    **harmless("their attention reads it in no call without a cache", "sliding_window"),
    **harmless("read under other names", "rope_theta", "partial_rotary_factor"),
}
EXPORTED_ATTENTION: Table = {
    **llama.PLAIN_ATTENTION,
    **honoured("heads", "rope_theta", "rotary"),
    **honoured("kv_heads", "head_dim"),  # `exported` looks at the sizes that they give
    "positions": only("rope"),
    "window": only(0),
    **llama.UNSCALED,
}
EXPORTED_MLP: Table = {**honoured("hidden", "activation"), "gated": only(False)}
PARTS = {"norm": "layer", "bias": True, "mlp.gated": False, "parallel_norms": True}  # of ours
EXPORTED: Table = {"norm": only("layer"), "bias": only(True), **honoured("parallel_norms")}
EMBEDDING, HEAD = "gpt_neox.embed_in.weight", "embed_out.weight"
ROTARY = "rotary_emb_base", "rotary_pct"  # fields of the base and the share of rotary positions
STEPS = {"attention|mlp": ("mixer_1", "mixer_1_norm"), "attention+mlp": ("mlp", "mlp_norm")}  # where the MLP is


def rotary_of(theirs: Mapping[str, Any], base: str, share_name: str) -> dict[str, float]:
    """Fields of model.attention for rotary positions of a part of a head, by the rules of transformers 5.

    Args:
        base, share_name: fields that have them in transformers 4.
    """
    name = "rope_scaling" if theirs["rope_scaling"] else "rope_parameters"
    rotary = theirs[name] or {}
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind != "default" or any(isinstance(value, Mapping) for value in rotary.values()):
        refuse(name, rotary, "only rope_type 'default' can be converted")
    theta = rotary.get("rope_theta", theirs[base])
    share = rotary.get("partial_rotary_factor", theirs[share_name])
    for field, value, rule in (("rope_theta", theta, positive), ("partial_rotary_factor", share, SHARE)):
        if not rule.test(value):
            refuse(f"{name}.{field}", value, f"allowed: {rule.words}")
    return dict(rope_theta=theta, rotary=share)


def check_turned(field: str, rotary: Mapping[str, float], head_dim: int) -> None:
    """Raise a UserError unless the share in `field` turns pairs of a head's channels."""
    if (turned := int(head_dim * rotary["rotary"])) % 2 or not turned:
        channels = f"{head_dim} channels of a head (head_dim, or hidden_size over num_attention_heads)"
        allowed = f"a share of the {channels} that makes an even number of them, not {turned}"
        refuse(field, rotary["rotary"], f"allowed: {allowed}")


def rotary_fields(attention: Mapping[str, Any], base: str, share_name: str) -> dict[str, Any]:
    """Fields of their config for these positions, for transformers 5 and 4; undoes `rotary_of`."""
    theta, share = attention["rope_theta"], attention["rotary"]
    rotary = dict(rope_type="default", rope_theta=theta, partial_rotary_factor=share)
    return {base: theta, share_name: share, "rope_parameters": rotary}


def config_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.model for the honoured fields of a GPT-NeoX config."""
    heads = llama.heads_of({**theirs, "head_dim": None, "num_key_value_heads": None})
    rotary = rotary_of(theirs, *ROTARY)
    check_turned("rotary_pct", rotary, heads["head_dim"])
    side_by_side = theirs["use_parallel_residual"]
    return dict(
        pattern="attention|mlp" if side_by_side else "attention+mlp",
        width=theirs["hidden_size"],
        repeats=theirs["num_hidden_layers"],
        vocab_size=theirs["vocab_size"],
        norm="layer",
        norm_eps=theirs["layer_norm_eps"],
        bias=True,
        **(dict(parallel_norms=True) if side_by_side else {}),
        tie_embeddings=theirs["tie_word_embeddings"],
        attention=dict(**heads, **rotary),
        mlp=dict(hidden=theirs["intermediate_size"], activation=llama.ACTIVATIONS[theirs["hidden_act"]], gated=False),
    )


def as_in_files(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors under the names of files, in which the head has another name than in memory; without buffers."""
    names = {"lm_head.weight": HEAD}
    buffers = (".attention.bias", ".attention.masked_bias")  # in files of transformers 4
    return {names.get(name, name): tensor for name, tensor in tensors.items() if not name.endswith(buffers)}


def weights(model: Mapping[str, Any]) -> list[Weight]:
    """Every tensor of a GPT-NeoX model."""
    V, D, F, heads = model["vocab_size"], model["width"], model["mlp"]["hidden"], model["attention"]["heads"]
    mlp_name, mlp_norm = STEPS[model["pattern"]]
    found = [
        same(EMBEDDING, ("embedding",), V, D),
        *norm_weights("gpt_neox.final_layer_norm.", ("final_norm",), D),
    ]
    for i in range(model["repeats"]):
        block, theirs = f"block_{i}", f"gpt_neox.layers.{i}."
        mixer, mlp = (block, "mixer"), (block, mlp_name)
        found += [
            *norm_weights(f"{theirs}input_layernorm.", (block, "norm"), D),
            *norm_weights(f"{theirs}post_attention_layernorm.", (block, mlp_norm), D),
            *attention_weights(f"{theirs}attention.", mixer, heads, D),
            turned(f"{theirs}mlp.dense_h_to_4h.weight", (F, D), (*mlp, "gate"), (D, F)),
            same(f"{theirs}mlp.dense_h_to_4h.bias", (*mlp, "gate_bias"), F),
            turned(f"{theirs}mlp.dense_4h_to_h.weight", (D, F), (*mlp, "down"), (F, D)),
            same(f"{theirs}mlp.dense_4h_to_h.bias", (*mlp, "down_bias"), D),
        ]
    return found


def norm_weights(theirs: str, ours: tuple[str, ...], width: int) -> list[Weight]:
    """Scale and bias of one layer norm."""
    return [same(f"{theirs}weight", (*ours, "scale"), width), same(f"{theirs}bias", (*ours, "bias"), width)]


def attention_weights(theirs: str, ours: tuple[str, ...], H: int, D: int) -> list[Weight]:
    """The tensors of one attention. Theirs hold query, key and value of a head behind one another, head by head."""
    d = D // H
    found = []
    for i, name in enumerate(("query", "key", "value")):
        part = (slice(None), i)
        matrix = ((*ours, name), (D, H, d), True, (H, 3, d, D), part)
        found.append(Weight(f"{theirs}query_key_value.weight", (3 * D, D), *matrix))
    for i, name in enumerate(("query", "key", "value")):
        bias = ((*ours, f"{name}_bias"), (D,), False, (H, 3, d), (slice(None), i))
        found.append(Weight(f"{theirs}query_key_value.bias", (3 * D,), *bias))
    return [
        *found,
        turned(f"{theirs}dense.weight", (D, D), (*ours, "out"), (H, d, D)),
        same(f"{theirs}dense.bias", (*ours, "out_bias"), D),
    ]


def is_like(model: Mapping[str, Any], blocks: list[pattern.Block]) -> bool:
    """Whether a model of ours has the parts of a GPT-NeoX, all of which no other model of transformers has.

    Raises:
        UserError: attention and MLP are side by side, as in no other, but something else differs.
    """
    side_by_side = set(blocks) == {(("attention", "mlp"),)}
    found = {"norm": model["norm"], "bias": bool(model["bias"])}
    found["mlp.gated"] = MLP.complete(model.get("mlp", {}))["gated"]
    if side_by_side:
        found["parallel_norms"] = model["parallel_norms"]
        for name, value in found.items():
            if value != PARTS[name]:
                problem = f"only {PARTS[name]!r} can be exported with model.pattern={model['pattern']!r}"
                raise UserError(f"model.{name} is {value!r}; {problem}")
    behind = set(blocks) == {(("attention",), ("mlp",))}
    return side_by_side or (behind and all(value == PARTS[name] for name, value in found.items()))


def exported(model: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.model with the sizes that `weights` needs, and the fields of their config.json."""
    attention, mlp = (group.complete(model.get(group.name, {})) for group in (ATTENTION, MLP))
    check_export(attention, EXPORTED_ATTENTION, ATTENTION.home)
    check_export(mlp, EXPORTED_MLP, MLP.home)
    D, H, d = np.shape(find(params, ("block_0", "mixer", "query")))
    for name, size, wanted in (
        ("kv_heads", np.shape(find(params, ("block_0", "mixer", "key")))[1], H),
        ("head_dim", d, D // H),
    ):
        if size != wanted:
            check_export({name: attention[name]}, {name: only(0)}, ATTENTION.home)
    _, hidden = np.shape(find(params, ("block_0", STEPS[model["pattern"]][0], "gate")))
    fields = dict(
        model_type="gpt_neox",
        architectures=["GPTNeoXForCausalLM"],
        hidden_act=llama.THEIR_ACTIVATIONS[mlp["activation"]],
        intermediate_size=hidden,
        num_attention_heads=H,
        layer_norm_eps=model["norm_eps"],
        use_parallel_residual=model["pattern"] == "attention|mlp",
        **rotary_fields(attention, *ROTARY),
    )
    return {**model, "attention": {**attention, "heads": H}, "mlp": {**mlp, "hidden": hidden}}, fields
