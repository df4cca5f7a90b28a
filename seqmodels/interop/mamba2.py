"""Fields, names and layouts of Mamba-2 models of transformers."""

from collections.abc import Mapping
from typing import Any

from seqmodels.errors import UserError
from seqmodels.fields.mamba2 import MAMBA2 as OURS
from seqmodels.fields.rules import Rule
from seqmodels.interop.generic import FRESH, ROUNDING, mamba_fields
from seqmodels.interop.mamba import stack
from seqmodels.interop.table import Honoured, Table, check_export, harmless, honoured, integer, only, refuse
from seqmodels.interop.weights import Weight, parts, same, turned


def unlimited(limit: Any) -> bool:
    """Whether no step size is outside these limits. Some files write infinity as a text."""
    low, high = limit if isinstance(limit, list | tuple) and len(limit) == 2 else (None, None)
    return low in (0, 0.0) and high in (float("inf"), "Infinity", "inf")


LIMIT = Rule(unlimited, "[0, Infinity], as our step sizes have no limits")

MAMBA2: Table = {
    **mamba_fields(vocab_size=32768, width=4096, layers=64, tied=False),
    "state_size": Honoured(128, integer()),
    "num_heads": Honoured(128, integer()),
    "head_dim": Honoured(64, integer()),
    "n_groups": Honoured(8, integer()),
    "time_step_limit": Honoured([0.0, float("inf")], LIMIT),
    **harmless(ROUNDING, "chunk_size"),
    **harmless("read by none of their layers", "intermediate_size", "norm_before_gate", "time_step_rank"),
}
EXPORTED: Table = {
    **honoured("state", "expand", "head_dim", "groups", "conv", "norm_eps"),
    **harmless(FRESH, "dt_min", "dt_max", "dt_floor"),
    "dt_scale": only(1.0),
}


def config_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.model for the honoured fields of a Mamba-2 config."""
    width, heads, head_dim = (theirs[name] for name in ("hidden_size", "num_heads", "head_dim"))
    if heads * head_dim != theirs["expand"] * width:
        refuse("num_heads", heads, f"num_heads * head_dim must be expand * hidden_size = {theirs['expand'] * width}")
    if heads % theirs["n_groups"]:
        refuse("n_groups", theirs["n_groups"], f"allowed: a divisor of num_heads={heads}")
    return dict(
        pattern="mamba2",
        width=width,
        repeats=theirs["num_hidden_layers"],
        vocab_size=theirs["vocab_size"],
        norm_eps=theirs["layer_norm_epsilon"],
        tie_embeddings=theirs["tie_word_embeddings"],
        mamba2=dict(
            state=theirs["state_size"],
            expand=theirs["expand"],
            head_dim=head_dim,
            groups=theirs["n_groups"],
            conv=theirs["conv_kernel"],
            norm_eps=theirs["layer_norm_epsilon"],
        ),
    )


def weights(model: Mapping[str, Any], embedding: str = "embeddings") -> list[Weight]:
    """Every tensor of a Mamba-2 model; `embedding` as of `seqmodels.interop.mamba.stack`."""
    D, options = model["width"], model["mamba2"]
    E, N, W, G = options["expand"] * D, options["state"], options["conv"], options["groups"]
    H = E // options["head_dim"]

    def mixer(theirs: str, ours: tuple[str, ...]) -> list[Weight]:
        return [
            *parts(
                f"{theirs}in_proj.weight",
                (D,),
                ((*ours, "in_proj"), 2 * E, (D, 2, E)),
                ((*ours, "BC_proj"), 2 * G * N, (D, 2 * G * N)),
                ((*ours, "dt_proj"), H, (D, H)),
            ),
            *parts(
                f"{theirs}conv1d.weight",
                (1, W),
                ((*ours, "conv_weight"), E, (W, E)),
                ((*ours, "BC_conv_weight"), 2 * G * N, (W, 2 * G * N)),
            ),
            *parts(
                f"{theirs}conv1d.bias",
                (),
                ((*ours, "conv_bias"), E, (E,)),
                ((*ours, "BC_conv_bias"), 2 * G * N, (2 * G * N,)),
            ),
            same(f"{theirs}dt_bias", (*ours, "dt_bias"), H),
            same(f"{theirs}A_log", (*ours, "A_log"), H),
            same(f"{theirs}D", (*ours, "D"), H),
            same(f"{theirs}norm.weight", (*ours, "scale"), E),
            turned(f"{theirs}out_proj.weight", (D, E), (*ours, "out_proj"), (E, D)),
        ]

    return stack(model, embedding, mixer)


def exported(model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.model with the sizes that `weights` needs, and the fields of their config.json."""
    options = OURS.complete(model.get("mamba2", {}))
    check_export(options, EXPORTED, OURS.home)
    if options["norm_eps"] != model["norm_eps"]:
        problem = f"only model.norm_eps, {model['norm_eps']}, can be exported"
        raise UserError(f"{OURS.place('norm_eps')} is {options['norm_eps']}; {problem}")
    fields = dict(
        model_type="mamba2",
        architectures=["Mamba2ForCausalLM"],
        state_size=options["state"],
        expand=options["expand"],
        head_dim=options["head_dim"],
        num_heads=options["expand"] * model["width"] // options["head_dim"],
        n_groups=options["groups"],
        conv_kernel=options["conv"],
        layer_norm_epsilon=model["norm_eps"],
        hidden_act="silu",
        use_bias=False,
        use_conv_bias=True,
    )
    return {**model, "mamba2": options}, fields
