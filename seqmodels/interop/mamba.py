"""Fields, names and layouts of Mamba and FalconMamba models of transformers."""

from collections.abc import Mapping
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


def weights(model: Mapping[str, Any], embedding: str = "embeddings") -> list[Weight]:
    """Every tensor of a Mamba or FalconMamba model. `embedding` is "embedding" in the files of Mamba's authors."""
    V, D, layers, options = model["vocab_size"], model["width"], model["repeats"], model["mamba"]
    E, N, W, R = options["expand"] * D, options["state"], options["conv"], options["dt_rank"] or -(-D // 16)
    found = [
        same(f"backbone.{embedding}.weight", ("embedding",), V, D),
        same("backbone.norm_f.weight", ("final_norm", "scale"), D),
    ]
    for i in range(layers):
        block, mixer = (f"block_{i}",), (f"block_{i}", "mixer")
        theirs = f"backbone.layers.{i}."
        found += [
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
    return found


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
        use_bias=False,
        use_conv_bias=True,
        **(dict(mixer_rms_eps=options["norm_eps"]) if falcon else {}),
    )
    return {**model, "mamba": options}, fields
