"""Converts models of transformers (`FAMILIES`) from the format of Hugging Face, and back.

Names are those in the files. Files of Mamba's authors name the embedding `backbone.embedding`, and have `lm_head` even
if it is tied.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from seqmodels import pattern
from seqmodels.errors import UserError
from seqmodels.fields.model import DENSE, MODEL
from seqmodels.interop import (
    denseretnet,
    gpt_neox,
    jamba,
    llama,
    mamba,
    mamba2,
    mixtral,
    olmo_hybrid,
    original,
    qwen3_next,
    recurrent_gemma,
    retnet,
    rwkv,
    torchscale,
)
from seqmodels.interop.generic import FRESH, ROUNDING, TRAINING
from seqmodels.interop.table import Table, check_export, harmless, honoured, missing, only, read
from seqmodels.interop.weights import Weight, arrays_of, convert, export, head

IGNORED = ("rotary_emb.inv_freq",)  # buffers in old Llama files, which follow from the config
HEAD = "lm_head.weight"
MAMBA_EMBEDDINGS = ("backbone.embeddings.weight", "backbone.embedding.weight")
LLAMA_EMBEDDINGS = ("model.embed_tokens.weight",)
FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}  # JSON does not have them


@dataclasses.dataclass(frozen=True)
class Family:
    """Models of one `model_type`.

    Attributes:
        table: what becomes of each field of their config.
        config_of: fields of config.model from the honoured fields of their config.
        weights: every tensor but the head, from the fields of config.model.
        embeddings: names that the embedding may have.
        as_in_files: the tensors of a model in memory under their names in files; None: these are the same.
        head: name of the matrix of the logits in files.
        exported: fields of config.model itself that they have, or must have, in place of those of `PLAIN`.
    """

    table: Table
    config_of: Callable[[Mapping[str, Any]], dict[str, Any]]
    weights: Callable[..., list[Weight]]
    embeddings: tuple[str, ...] = MAMBA_EMBEDDINGS
    as_in_files: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    head: str = HEAD
    exported: Table = dataclasses.field(default_factory=dict)


FAMILIES = {
    "mamba": Family(mamba.MAMBA, mamba.config_of, mamba.weights),
    "mamba2": Family(mamba2.MAMBA2, mamba2.config_of, mamba2.weights),
    "falcon_mamba": Family(mamba.FALCON, mamba.config_of, mamba.weights),
    "llama": Family(llama.LLAMA, llama.config_of, llama.weights, LLAMA_EMBEDDINGS, exported=llama.EXPORTED),
    "mistral": Family(llama.MISTRAL, llama.config_of, llama.weights, LLAMA_EMBEDDINGS),
    "mixtral": Family(mixtral.MIXTRAL, mixtral.config_of, mixtral.weights, LLAMA_EMBEDDINGS, mixtral.as_in_files),
    "jamba": Family(jamba.JAMBA, jamba.config_of, jamba.weights, LLAMA_EMBEDDINGS, jamba.as_in_files),
    "gpt_neox": Family(
        gpt_neox.GPT_NEOX,
        gpt_neox.config_of,
        gpt_neox.weights,
        (gpt_neox.EMBEDDING,),
        gpt_neox.as_in_files,
        gpt_neox.HEAD,
        gpt_neox.EXPORTED,
    ),
    "olmo_hybrid": Family(
        olmo_hybrid.OLMO_HYBRID,
        olmo_hybrid.config_of,
        olmo_hybrid.weights,
        LLAMA_EMBEDDINGS,
        olmo_hybrid.as_in_files,
        exported=olmo_hybrid.EXPORTED,
    ),
    "qwen3_next": Family(
        qwen3_next.QWEN3_NEXT,
        qwen3_next.config_of,
        qwen3_next.weights,
        LLAMA_EMBEDDINGS,
        qwen3_next.as_in_files,
        exported=qwen3_next.EXPORTED,
    ),
    "recurrent_gemma": Family(
        recurrent_gemma.RECURRENT_GEMMA,
        recurrent_gemma.config_of,
        recurrent_gemma.weights,
        LLAMA_EMBEDDINGS,
        exported=recurrent_gemma.EXPORTED,
    ),
    "retnet": Family(retnet.RETNET, retnet.config_of, retnet.weights, (retnet.EMBEDDING,), retnet.as_in_files),
    "rwkv": Family(rwkv.RWKV, rwkv.config_of, rwkv.weights, (rwkv.EMBEDDING,), head=rwkv.HEAD, exported=rwkv.EXPORTED),
}

TORCHSCALE = Family(
    torchscale.TABLE, torchscale.config_of, torchscale.weights, (torchscale.EMBEDDING,), head=torchscale.HEAD
)

OTHERS = {  # known models that cannot be imported, and why
    "qwen3_5": "no importer is written for it",
    "qwen3_5_moe": "no importer is written for it",
    "rwkv7": "it needs the mixer of RWKV-7",
}

EXPORTED: Table = {  # fields of config.model itself
    **honoured("norm_eps", "pattern", "repeats", "tie_embeddings", "vocab_size", "width"),
    # as far as PLAIN or a family allows
    **honoured("bias", "embedding_norm", "embedding_scale", "logit_softcap", "norm", "norms_behind", "parallel_norms"),
    "input": only("tokens"),
    "head": only("next_token"),
    "depth": only("none"),
    "short_conv": only(0),
    "positions": only("none"),
    **harmless("read with positions='learned'", "position_table"),
    **harmless(FRESH, "embedding_std"),
    **harmless(TRAINING, "dropout", "remat", "remat_blocks"),
    **harmless(ROUNDING, "dtype", "residual_dtype"),
    **harmless("the parameters must be unstacked", "scan_blocks"),
    **harmless("vocab_size is filled in", "vocab_multiple"),
    "rescale": only(1.0),
    **harmless("read with other inputs and heads", "horizon", "patch", "pool"),
    "window_norm": only(False),
    "observed": only(False),
}
PLAIN: Table = {  # what a family has unless its `exported` says something else
    "bias": only(False),
    "embedding_norm": only(False),
    "embedding_scale": only(1.0),
    "logit_softcap": only(0.0),
    "norm": only("rms"),
    "norms_behind": only(""),
    "parallel_norms": only(False),
}
EXPORTED_DENSE: Table = {
    **harmless("read only with a variant", *DENSE.fields),
    "variant": only("none"),  # transformers has no DenseSSM models
}


def from_huggingface(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> tuple[dict, dict]:
    """Convert a pretrained model from other code into ours.

    Args:
        tensors: tensors by their names in the file, of a model_type in `FAMILIES`, or from Mamba's, RetNet's or
            DenseRetNet's authors. The names of a model in memory will do too.
        config: their config.json.

    Returns:
        Fields of `config.model` (nested, they replace the defaults), and the parameters, unrolled and float32, as
        `LanguageModel.apply` takes them in {"params": parameters}.

    Raises:
        UserError: another kind of model, a field with a value that our models do not have, or tensors that are missing,
            unexpected or of the wrong shape or dtype.
    """
    model, params = read_model(tensors, config)
    return model, arrays_of(params)


def read_model(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[dict, dict]:
    """As `from_huggingface`, but the parameters are not read yet: `np.asarray` makes an array of each.

    So `tensors` may be those of files (`seqmodels.interop.files`), of which one at a time is in memory.
    """
    config = plain(config)
    if denseretnet.WITNESS in tensors:  # their config.json may say llama
        model = denseretnet.config_of(tensors, config)
        return model, convert(denseretnet.without_unused(tensors, model), denseretnet.weights(model))
    if torchscale.WITNESS in tensors or torchscale.PREFIX + torchscale.WITNESS in tensors:
        tensors = torchscale.without_prefix(tensors)
        rows = rows_of(tensors, TORCHSCALE)
        model = torchscale.config_of(read(config, torchscale.TABLE, "RetNet (torchscale)") | dict(vocab_size=rows))
        return model, converted(tensors, model, TORCHSCALE)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(IGNORED)}
    kind = config.get("model_type")
    if kind is None and "d_model" in config:
        tensors = with_prefix(tensors, FAMILIES["mamba"])
        model = original.config_of(config, vocab_size=rows_of(tensors, FAMILIES["mamba"]))
        return model, converted(tensors, model, FAMILIES[model["pattern"]])
    if isinstance(kind, str) and kind in OTHERS:
        raise UserError(f"Hugging Face config: model_type {kind!r} cannot be converted: {OTHERS[kind]}")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"Hugging Face config: model_type is {kind!r}; allowed: {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    tensors = with_prefix(tensors, family)
    tensors = family.as_in_files(tensors) if family.as_in_files else tensors
    model = family.config_of(read(config, family.table, kind))
    try:
        return model, converted(tensors, model, family)
    except UserError as problem:
        if not (sizes := missing(config, family.table)):
            raise
        names, values = ", ".join(map(repr, sizes)), ", ".join(map(str, sizes.values()))
        field = f"the field {names} of a {kind} model is missing"
        default = f"with {values}, which transformers takes then, the weights do not fit: {problem}"
        raise UserError(f"Hugging Face config: {field}, and {default}") from None


def converted(tensors: Mapping[str, Any], model: Mapping[str, Any], family: Family) -> dict:
    """Our parameters, not read yet, from their tensors, for the fields of config.model."""
    rows_of(tensors, family)
    if model["repeats"] > len(tensors):  # before a list of their names is made
        raise UserError(
            f"Hugging Face weights: only {len(tensors)} tensors; the config asks for {model['repeats']} layers"
        )
    embedding = next((name for name in family.embeddings if name in tensors), family.embeddings[0])
    if model["tie_embeddings"]:
        tensors = once(tensors, embedding, family.head)
    spelling = dict(embedding=embedding.split(".")[1]) if len(family.embeddings) > 1 else {}
    return convert(tensors, family.weights(model, **spelling) + head(model, family.head))


def rows_of(tensors: Mapping[str, Any], family: Family) -> int:
    """Size of the vocabulary. A UserError if there is no matrix with a row for each token."""
    for name in (*family.embeddings, family.head):
        if name in tensors:
            return tensors[name].shape[0]
    raise UserError(f"Hugging Face weights: no embedding; {' or '.join(family.embeddings)} is needed")


def plain(value: Any) -> Any:
    """A config in which infinity is a number again, which transformers writes as {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"} and value["__float__"] in FLOATS:
            return FLOATS[value["__float__"]]
        return {name: plain(field) for name, field in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def with_prefix(tensors: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Tensors under their names in a model with a head. The file of a model without one has no prefix."""
    for name in family.embeddings:
        prefix, rest = name.split(".", 1)
        if rest in tensors:
            heads = (HEAD, family.head)
            return {each if each in heads else f"{prefix}.{each}": tensor for each, tensor in tensors.items()}
    return dict(tensors)


def once(tensors: Mapping[str, Any], embedding: str, head: str) -> dict[str, Any]:
    """The tensors with a tied matrix under the name `embedding` only. A file may have it as the head, or twice.

    Raises:
        UserError: the head and the embedding differ.
    """
    if head not in tensors:
        return dict(tensors)
    if embedding in tensors and not np.array_equal(tensors[head], tensors[embedding]):
        raise UserError(
            f"Hugging Face weights: {head} differs from {embedding}, to which tie_word_embeddings ties it; "
            "set that field to false in config.json if both are right"
        )
    return {embedding: tensors[head]} | {name: tensor for name, tensor in tensors.items() if name != head}


def to_huggingface(params: Mapping, model: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict]:
    """Converts our model into the names and layouts of transformers.

    Args:
        params: of `LanguageModel`, unrolled (see `seqmodels.interop.stacking.unstack`), without boxes.
        model: `config.model` with vocab_size filled in (`LanguageModel.config`).

    Returns:
        Tensors by file name, float32, and the config.json: of a model_type in `FAMILIES`.

    Raises:
        UserError: transformers has no such model.
    """
    tensors, config = write_model(params, model)
    return dict(tensors), config


def write_model(params: Mapping, model: Mapping[str, Any]) -> tuple[Iterator[tuple[str, np.ndarray]], dict]:
    """As `to_huggingface`, with one tensor after another. So no more than one parameter must be in memory."""
    model = model.to_dict() if isinstance(model, ConfigDict | FrozenConfigDict) else dict(model)
    fields = {name: value for name, value in model.items() if not isinstance(value, Mapping)}  # without groups
    check_export(fields, EXPORTED, MODEL.home)
    check_export(model["dense"], EXPORTED_DENSE, DENSE.home)
    blocks = pattern.parse(model["pattern"])
    layers = model["repeats"] * len(blocks)
    kind, exported = _export_of(blocks, model)
    if len(set(blocks)) == 1:
        model |= dict(pattern="+".join("|".join(step) for step in blocks[0]), repeats=layers)
    family = FAMILIES[kind]
    possible = {**PLAIN, **family.exported}
    check_export({name: fields[name] for name in possible if name in fields}, possible, MODEL.home)
    model, fields = exported(model, params)
    config = dict(
        vocab_size=model["vocab_size"],
        hidden_size=model["width"],
        num_hidden_layers=layers,
        tie_word_embeddings=model["tie_embeddings"],
        dtype="float32",
    )
    return export(params, family.weights(model) + head(model, family.head)), {**config, **fields}


def _export_of(blocks: list[pattern.Block], model: Mapping[str, Any]) -> tuple[str, Callable[..., tuple[dict, dict]]]:
    """The family that has models of these blocks, and its function `exported(model, params)`.

    Raises:
        UserError: there is none.
    """
    kinds = set(blocks)
    if kinds == {(("mamba",),)}:
        return "mamba", lambda model, params: mamba.exported(model)
    if kinds == {(("mamba2",),)}:
        return "mamba2", lambda model, params: mamba2.exported(model)
    if gpt_neox.is_like(model, blocks):
        return "gpt_neox", gpt_neox.exported
    if kinds == {(("attention",), ("mlp",))}:
        return "llama", llama.exported
    if kinds == {(("attention",), ("moe",))}:
        return "mixtral", mixtral.exported
    if kinds <= {((mixer,), (channel,)) for mixer in ("attention", "mamba") for channel in ("mlp", "moe")}:
        return "jamba", jamba.exported
    if kinds == {(("gated_deltanet",), ("mlp",)), (("attention",), ("mlp",))} and model["norm"] != "centred":
        return "olmo_hybrid", olmo_hybrid.exported
    with_delta = any(block[0] == ("gated_deltanet",) for block in kinds)
    if with_delta and kinds <= {((a,), (b,)) for a in ("gated_deltanet", "attention") for b in ("mlp", "moe")}:
        return "qwen3_next", qwen3_next.exported
    if kinds == {(("retnet",), ("mlp",))}:
        return "retnet", retnet.exported
    if kinds == {(("rwkv",), ("rwkv_channel",))}:
        return "rwkv", rwkv.exported
    if (("rglru",), ("mlp",)) in kinds and kinds <= {((mixer,), ("mlp",)) for mixer in ("rglru", "attention")}:
        return "recurrent_gemma", recurrent_gemma.exported
    allowed = "'mamba', 'mamba2', 'attention+mlp', 'attention+moe', or of these with 'mamba+mlp' and 'mamba+moe'"
    raise UserError(f"model.pattern is {model['pattern']!r}; only blocks of {allowed} can be exported")
