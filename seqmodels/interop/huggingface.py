"""Converts Mamba, Mamba-2, FalconMamba and Llama models from the format of Hugging Face, and back.

Names are those in the files. Files of Mamba's authors name the embedding `backbone.embedding`, and have `lm_head` even
if it is tied.
"""

from collections.abc import Mapping

import numpy as np

from seqmodels.errors import UserError
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.mamba import MAMBA
from seqmodels.interop import denseretnet, mamba2
from seqmodels.interop.weights import Weight, convert, demand, export, find, same, turned

IGNORED = ("rotary_emb.inv_freq",)  # buffers in old Llama files, which follow from the config
DEFAULT_ROPE_THETA = 10_000.0


def mamba_weights(model: Mapping, tied: bool, embedding: str = "embeddings") -> list[Weight]:
    """Every tensor of a Mamba or FalconMamba model. `embedding` is "embedding" in the files of Mamba's authors."""
    V, D, layers, options = model["vocab_size"], model["width"], model["repeats"], model["mamba"]
    E, N, W, R = options["expand"] * D, options["state"], options["conv"], options["dt_rank"] or -(-D // 16)
    weights = [
        same(f"backbone.{embedding}.weight", ("embedding",), V, D),
        same("backbone.norm_f.weight", ("final_norm", "scale"), D),
    ]
    for i in range(layers):
        block, mixer = (f"block_{i}",), (f"block_{i}", "mixer")
        theirs = f"backbone.layers.{i}."
        weights += [
            same(f"{theirs}norm.weight", (*block, "norm", "scale"), D),
            turned(f"{theirs}mixer.in_proj.weight", (2 * E, D), (*mixer, "in_proj"), (D, 2, E)),
            turned(f"{theirs}mixer.conv1d.weight", (E, 1, W), (*mixer, "conv_weight"), (W, E)),
            same(f"{theirs}mixer.conv1d.bias", (*mixer, "conv_bias"), E),
            turned(f"{theirs}mixer.x_proj.weight", (R + 2 * N, E), (*mixer, "x_proj"), (E, R + 2 * N)),
            turned(f"{theirs}mixer.dt_proj.weight", (E, R), (*mixer, "dt_proj"), (R, E)),
            same(f"{theirs}mixer.dt_proj.bias", (*mixer, "dt_bias"), E),
            same(f"{theirs}mixer.A_log", (*mixer, "A_log"), E, N),
            same(f"{theirs}mixer.D", (*mixer, "D"), E),
            turned(f"{theirs}mixer.out_proj.weight", (D, E), (*mixer, "out_proj"), (E, D)),
        ]
    return weights if tied else [*weights, turned("lm_head.weight", (V, D), ("head",), (D, V))]


def llama_weights(model: Mapping, tied: bool) -> list[Weight]:
    """Every tensor of a Llama or Mistral model."""
    V, D, layers, F = model["vocab_size"], model["width"], model["repeats"], model["mlp"]["hidden"]
    H, K, d = (model["attention"][name] for name in ("heads", "kv_heads", "head_dim"))
    weights = [
        same("model.embed_tokens.weight", ("embedding",), V, D),
        same("model.norm.weight", ("final_norm", "scale"), D),
    ]
    for i in range(layers):
        block, mixer, mlp = (f"block_{i}",), (f"block_{i}", "mixer"), (f"block_{i}", "mlp")
        theirs = f"model.layers.{i}."
        weights += [
            same(f"{theirs}input_layernorm.weight", (*block, "norm", "scale"), D),
            turned(f"{theirs}self_attn.q_proj.weight", (H * d, D), (*mixer, "query"), (D, H, d)),
            turned(f"{theirs}self_attn.k_proj.weight", (K * d, D), (*mixer, "key"), (D, K, d)),
            turned(f"{theirs}self_attn.v_proj.weight", (K * d, D), (*mixer, "value"), (D, K, d)),
            turned(f"{theirs}self_attn.o_proj.weight", (D, H * d), (*mixer, "out"), (H, d, D)),
            same(f"{theirs}post_attention_layernorm.weight", (*block, "mlp_norm", "scale"), D),
            turned(f"{theirs}mlp.gate_proj.weight", (F, D), (*mlp, "gate"), (D, F)),
            turned(f"{theirs}mlp.up_proj.weight", (F, D), (*mlp, "up"), (D, F)),
            turned(f"{theirs}mlp.down_proj.weight", (D, F), (*mlp, "down"), (F, D)),
        ]
    return weights if tied else [*weights, turned("lm_head.weight", (V, D), ("head",), (D, V))]


def mamba_config(config: Mapping, vocab_size: int) -> dict:
    """Fields of config.model for a Mamba or FalconMamba config of transformers."""
    demand(config, hidden_act=("silu",), use_bias=(False,), use_conv_bias=(True,), time_step_scale=(1.0,))
    width, rank = config["hidden_size"], config.get("time_step_rank", "auto")
    falcon = config["model_type"] == "falcon_mamba"
    options = dict(
        state=config["state_size"],
        expand=config["expand"],
        conv=config["conv_kernel"],
        dt_rank=0 if rank == "auto" else rank,
        norms="rms" if falcon else "none",
    )
    demand(config, intermediate_size=(options["expand"] * width,))
    if falcon:
        options["norm_eps"] = config["mixer_rms_eps"]
    return dict(
        pattern="mamba",
        width=width,
        repeats=config["num_hidden_layers"],
        vocab_size=vocab_size,
        norm_eps=config["layer_norm_epsilon"],
        tie_embeddings=config.get("tie_word_embeddings", True),
        mamba=options,
    )


def original_mamba_config(config: Mapping, vocab_size: int) -> dict:
    """Fields of config.model for a config of Mamba's authors: d_model, n_layer, ssm_cfg, ..."""
    demand(config, rms_norm=(True,), attn_layer_idx=([],), d_intermediate=(0,))
    ssm = config.get("ssm_cfg") or {}
    demand(ssm, layer=("Mamba1", "Mamba2"), bias=(False,), conv_bias=(True,))
    pattern = "mamba2" if ssm.get("layer") == "Mamba2" else "mamba"
    if pattern == "mamba2":
        options = mamba2.original_options(ssm)
    else:
        rank = ssm.get("dt_rank", "auto")
        options = dict(
            state=ssm.get("d_state", 16),
            expand=ssm.get("expand", 2),
            conv=ssm.get("d_conv", 4),
            dt_rank=0 if rank == "auto" else rank,
            norms="none",
        )
    return dict(
        pattern=pattern,
        width=config["d_model"],
        repeats=config["n_layer"],
        vocab_size=vocab_size,
        norm_eps=1e-5,
        tie_embeddings=config.get("tie_embeddings", True),
        **{pattern: options},
    )


def llama_config(config: Mapping, vocab_size: int) -> dict:
    """Fields of config.model for a Llama or Mistral config of transformers, of version 5 or before."""
    demand(config, hidden_act=("silu",), attention_bias=(False,), mlp_bias=(False,), rope_scaling=(None,))
    rotary = config.get("rope_parameters") or {}
    demand(rotary, rope_type=("default",))
    width, heads = config["hidden_size"], config["num_attention_heads"]
    return dict(
        pattern="attention+mlp",
        width=width,
        repeats=config["num_hidden_layers"],
        vocab_size=vocab_size,
        norm_eps=config["rms_norm_eps"],
        tie_embeddings=config.get("tie_word_embeddings", False),
        attention=dict(
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or width // heads,
            rope_theta=rotary.get("rope_theta", config.get("rope_theta", DEFAULT_ROPE_THETA)),
            window=config.get("sliding_window") or 0,
        ),
        mlp=dict(hidden=config["intermediate_size"]),
    )


def from_huggingface(tensors: Mapping[str, np.ndarray], config: Mapping) -> tuple[dict, dict]:
    """Convert a pretrained model from other code into ours.

    Args:
        tensors: tensors by their names in the file, of model_type mamba, mamba2, falcon_mamba, llama or mistral, or
            from Mamba's or DenseRetNet's authors.
        config: their config.json.

    Returns:
        Fields of `config.model` (nested, they replace the defaults), and the parameters, unrolled and float32, as
        `LanguageModel.apply` takes them in {"params": parameters}.

    Raises:
        UserError: another kind of model, or tensors that are missing, unexpected or of the wrong shape.
    """
    if denseretnet.WITNESS in tensors:  # their config.json may say llama
        model = denseretnet.config_of(tensors, config)
        return model, convert(denseretnet.without_unused(tensors, model), denseretnet.weights(model))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(IGNORED)}
    vocabularies = ("backbone.embeddings.weight", "backbone.embedding.weight", "model.embed_tokens.weight")
    found = [name for name in vocabularies if name in tensors]
    if not found:
        raise UserError(f"Hugging Face weights: no embedding; one of {', '.join(vocabularies)} is needed")
    vocab_size = tensors[found[0]].shape[0]  # from the tensor: the config of Mamba's authors has the unpadded number
    kind = config.get("model_type", "original mamba" if "d_model" in config else None)
    try:
        if kind == "original mamba":
            model = original_mamba_config(config, vocab_size)
        elif kind in ("mamba", "falcon_mamba"):
            model = mamba_config(config, vocab_size)
        elif kind == "mamba2":
            model = mamba2.config_of(config, vocab_size)
        elif kind in ("llama", "mistral"):
            model = llama_config(config, vocab_size)
        else:
            allowed = "mamba, mamba2, falcon_mamba, llama, mistral"
            raise UserError(f"Hugging Face config: model_type is {kind!r}; allowed: {allowed}")
    except KeyError as field:
        raise UserError(f"Hugging Face config: the field {field} of a {kind} model is missing") from None
    tied = model["tie_embeddings"]
    if tied and "lm_head.weight" in tensors:  # written out although tied
        if not np.array_equal(tensors["lm_head.weight"], tensors[found[0]]):
            raise UserError("Hugging Face weights: lm_head.weight differs from the embedding that it is tied to")
        tensors = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    if kind in ("llama", "mistral"):
        weights = llama_weights(model, tied)
    else:
        names = mamba2.weights if model["pattern"] == "mamba2" else mamba_weights
        weights = names(model, tied, embedding=found[0].split(".")[1])
    return model, convert(tensors, weights)


def to_huggingface(params: Mapping, model: Mapping) -> tuple[dict[str, np.ndarray], dict]:
    """Converts our model into the names and layouts of transformers.

    Args:
        params: of `LanguageModel`, unrolled (see `seqmodels.interop.stacking.unstack`), without boxes.
        model: `config.model` with vocab_size filled in (`LanguageModel.config`).

    Returns:
        Tensors by file name, float32, and the config.json: of model_type mamba, mamba2, falcon_mamba, llama or mistral.

    Raises:
        UserError: transformers has no such model.
    """
    if model["dense"]["variant"] != "none":
        raise UserError(f"model.dense.variant is {model['dense']['variant']!r}; transformers has no DenseSSM models")
    shared = dict(
        vocab_size=model["vocab_size"],
        hidden_size=model["width"],
        num_hidden_layers=model["repeats"],
        tie_word_embeddings=model["tie_embeddings"],
        hidden_act="silu",
        dtype="float32",
    )
    pattern = model["pattern"].split()
    if set(pattern) == {"mamba"}:
        model = {**model, "repeats": model["repeats"] * len(pattern), "mamba": mamba_options(model)}
        config = {**shared, "num_hidden_layers": model["repeats"], **mamba_fields(model)}
        weights = mamba_weights(model, model["tie_embeddings"])
    elif set(pattern) == {"mamba2"}:
        model = {**model, "repeats": model["repeats"] * len(pattern), "mamba2": mamba2.options(model)}
        config = {**shared, "num_hidden_layers": model["repeats"], **mamba2.fields(model)}
        weights = mamba2.weights(model, model["tie_embeddings"])
    elif set(pattern) == {"attention+mlp"}:
        model = {**model, "repeats": model["repeats"] * len(pattern), **llama_options(model, params)}
        config = {**shared, "num_hidden_layers": model["repeats"], **llama_fields(model)}
        weights = llama_weights(model, model["tie_embeddings"])
    else:
        raise UserError(
            f"model.pattern is {model['pattern']!r}; only 'mamba', 'mamba2', 'attention+mlp' can be exported"
        )
    return export(params, weights), config


def mamba_options(model: Mapping) -> dict:
    """config.model.mamba with every default filled in."""
    return MAMBA.complete(model.get("mamba", {}))


def mamba_fields(model: Mapping) -> dict:
    """Fields of config.json for the Mamba mixer."""
    options = model["mamba"]
    kinds = {"none": "mamba", "rms": "falcon_mamba"}
    if options["norms"] not in kinds:
        raise UserError(f"mamba.norms is {options['norms']!r}; only {', '.join(kinds)} can be exported")
    falcon = options["norms"] == "rms"
    return dict(
        model_type=kinds[options["norms"]],
        architectures=["FalconMambaForCausalLM" if falcon else "MambaForCausalLM"],
        state_size=options["state"],
        expand=options["expand"],
        intermediate_size=options["expand"] * model["width"],
        conv_kernel=options["conv"],
        time_step_rank=options["dt_rank"] or -(-model["width"] // 16),
        layer_norm_epsilon=model["norm_eps"],
        use_bias=False,
        use_conv_bias=True,
        **(dict(mixer_rms_eps=options["norm_eps"]) if falcon else {}),
    )


def llama_options(model: Mapping, params: Mapping) -> dict:
    """config.model.attention and .mlp with every default filled in. The sizes come from the parameters."""
    _, heads, head_dim = np.shape(find(params, ("block_0", "mixer", "query")))
    _, kv_heads, _ = np.shape(find(params, ("block_0", "mixer", "key")))
    options = ATTENTION.complete(model.get("attention", {}))
    hidden = np.shape(find(params, ("block_0", "mlp", "gate")))[1]
    return dict(
        attention={**options, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}, mlp=dict(hidden=hidden)
    )


def llama_fields(model: Mapping) -> dict:
    """Fields of config.json for attention and MLP."""
    options = model["attention"]
    mistral = bool(options["window"])
    return dict(
        model_type="mistral" if mistral else "llama",
        architectures=["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        intermediate_size=model["mlp"]["hidden"],
        num_attention_heads=options["heads"],
        num_key_value_heads=options["kv_heads"],
        head_dim=options["head_dim"],
        rms_norm_eps=model["norm_eps"],
        rope_theta=options["rope_theta"],
        rope_parameters=dict(rope_type="default", rope_theta=options["rope_theta"]),
        **(dict(sliding_window=options["window"]) if mistral else dict(attention_bias=False, mlp_bias=False)),
    )
