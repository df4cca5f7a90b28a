"""Fields, names and layouts of Mamba and FalconMamba models of transformers."""

from collections.abc import Callable, Mapping
from typing import Any

from seqmodels.fields.mamba import MAMBA as OURS
from seqmodels.fields.rules import Rule
from seqmodels.interop.generic import FRESH, ROUNDING, mamba_fields
from seqmodels.interop.table import (
    Honoured,
    Table,
    check_export,
    harmless,
    honoured,
    integer,
    only,
    positive,
    refuse,
)
from seqmodels.interop.weights import Weight, same, turned

RANK = Rule(lambda value: value == "auto" or integer().test(value), "'auto' or an integer, at least 1")

MAMBA: Table = {
    **mamba_fields(vocab_size=50280, width=768, layers=32, tied=True),
    "state_size": Honoured(16, integer()),
    "intermediate_size": Honoured(None, integer()),
    "time_step_rank": Honoured("auto", RANK),
    **harmless(ROUNDING, "use_associative_scan", "use_mambapy"),
}
FALCON: Table = {**MAMBA, "mixer_rms_eps": Honoured(1e-6, positive), **harmless(ROUNDING, "use_falcon_mambapy")}

EXPORTED: Table = {
    **honoured("state", "expand", "conv", "dt_rank"),
    "norms": only("none", "rms"),
    **honoured("norm_eps"),  # of these norms, so without them it means nothing
    **harmless(FRESH, "dt_min", "dt_max", "dt_floor"),
    "dt_scale": only(1.0),
}


def config_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.model for the honoured fields of a Mamba or FalconMamba config."""
    falcon = "mixer_rms_eps" in theirs
    width, inner, rank = (theirs[name] for name in ("hidden_size", "intermediate_size", "time_step_rank"))
    if inner is not None and inner % width:
        refuse("intermediate_size", inner, f"only multiples of hidden_size={width} can be converted")
    options = dict(
        state=theirs["state_size"],
        expand=theirs["expand"] if inner is None else inner // width,  # where both are there, `expand` is not read
        conv=theirs["conv_kernel"],
        dt_rank=0 if rank == "auto" else rank,
        norms="rms" if falcon else "none",
    )
    if falcon:
        options["norm_eps"] = theirs["mixer_rms_eps"]
    return dict(
        pattern="mamba",
        width=width,
        repeats=theirs["num_hidden_layers"],
        vocab_size=theirs["vocab_size"],
        norm_eps=theirs["layer_norm_epsilon"],
        tie_embeddings=theirs["tie_word_embeddings"],
        mamba=options,
    )


def stack(
    model: Mapping[str, Any], embedding: str, mixer: Callable[[str, tuple[str, ...]], list[Weight]]
) -> list[Weight]:
    """Every tensor of a stack of Mambas of either kind.

    Args:
        embedding: "embeddings", or "embedding" in the files of Mamba's authors.
        mixer: (their prefix, our path) to the tensors of one mixer.
    """
    V, D = model["vocab_size"], model["width"]
    found = [
        same(f"backbone.{embedding}.weight", ("embedding",), V, D),
        same("backbone.norm_f.weight", ("final_norm", "scale"), D),
    ]
    for i in range(model["repeats"]):
        theirs, ours = f"backbone.layers.{i}.", f"block_{i}"
        found.append(same(f"{theirs}norm.weight", (ours, "norm", "scale"), D))
        found += mixer(f"{theirs}mixer.", (ours, "mixer"))
    return found


def weights(model: Mapping[str, Any], embedding: str = "embeddings") -> list[Weight]:
    """Every tensor of a Mamba or FalconMamba model; `embedding` as of `stack`."""
    return stack(model, embedding, lambda theirs, ours: mixer_weights(model, theirs, ours))


def mixer_sizes(model: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """E inner width, N state, W convolution width, R rank of the step."""
    D, options = model["width"], model["mamba"]
    return options["expand"] * D, options["state"], options["conv"], options["dt_rank"] or -(-D // 16)


def mixer_weights(model: Mapping[str, Any], theirs: str, ours: tuple[str, ...]) -> list[Weight]:
    """The tensors of one Mamba without norms, from their prefix to our path."""
    D, (E, N, W, R) = model["width"], mixer_sizes(model)
    return [
        turned(f"{theirs}in_proj.weight", (2 * E, D), (*ours, "in_proj"), (D, 2, E)),
        turned(f"{theirs}conv1d.weight", (E, 1, W), (*ours, "conv_weight"), (W, E)),
        same(f"{theirs}conv1d.bias", (*ours, "conv_bias"), E),
        turned(f"{theirs}x_proj.weight", (R + 2 * N, E), (*ours, "x_proj"), (E, R + 2 * N)),
        turned(f"{theirs}dt_proj.weight", (E, R), (*ours, "dt_proj"), (R, E)),
        same(f"{theirs}dt_proj.bias", (*ours, "dt_bias"), E),
        same(f"{theirs}A_log", (*ours, "A_log"), E, N),
        same(f"{theirs}D", (*ours, "D"), E),
        turned(f"{theirs}out_proj.weight", (D, E), (*ours, "out_proj"), (E, D)),
    ]


def exported(model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.model with the sizes that `weights` needs, and the fields of their config.json."""
    options = OURS.complete(model.get("mamba", {}))
    check_export(options, EXPORTED, OURS.home)
    falcon = options["norms"] == "rms"
    fields = dict(
        model_type="falcon_mamba" if falcon else "mamba",
        architectures=["FalconMambaForCausalLM" if falcon else "MambaForCausalLM"],
        state_size=options["state"],
        expand=options["expand"],
        intermediate_size=options["expand"] * model["width"],
        conv_kernel=options["conv"],
        time_step_rank=options["dt_rank"] or -(-model["width"] // 16),
        layer_norm_epsilon=model["norm_eps"],
        hidden_act="silu",
        use_bias=False,
        use_conv_bias=True,
        **(dict(mixer_rms_eps=options["norm_eps"]) if falcon else {}),
    )
    return {**model, "mamba": options}, fields
