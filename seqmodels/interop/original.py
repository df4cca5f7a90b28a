"""Fields of the config.json of Mamba's authors: d_model, n_layer, ssm_cfg and others (mamba_ssm)."""

from collections.abc import Mapping
from typing import Any

from seqmodels.fields.rules import Rule
from seqmodels.interop import mamba2
from seqmodels.interop.generic import COMMON, FRESH, ROUNDING
from seqmodels.interop.mamba import RANK
from seqmodels.interop.table import Honoured, Table, flag, harmless, integer, only, optional, read, refuse

OBJECT = Rule(lambda value: isinstance(value, Mapping), "an object")
EPSILON = 1e-5  # of all their norms; no field changes it

MODEL: Table = {
    **COMMON,
    "d_model": Honoured(2560, integer()),
    "n_layer": Honoured(64, integer()),
    "ssm_cfg": Honoured({}, optional(OBJECT)),
    "tie_embeddings": Honoured(True, flag),
    "rms_norm": only(True),
    "attn_layer_idx": only([], None),
    "d_intermediate": only(0),
    **harmless("read where attn_layer_idx names a layer", "attn_cfg"),
    **harmless("the rows of the embedding are the padded size", "vocab_size", "pad_vocab_size_multiple"),
    **harmless(ROUNDING, "fused_add_norm", "residual_in_fp32"),
}
LAYER: Table = {  # of ssm_cfg
    "layer": Honoured("Mamba1", Rule(lambda value: value in ("Mamba1", "Mamba2"), "'Mamba1' or 'Mamba2'")),
    "d_conv": Honoured(4, integer(2, 8)),
    "expand": Honoured(2, integer()),
    "bias": only(False),
    "conv_bias": only(True),
    **harmless(FRESH, "dt_min", "dt_max", "dt_init_floor"),
}
MAMBA: Table = {
    **LAYER,
    "d_state": Honoured(16, integer()),
    "dt_rank": Honoured("auto", RANK),
    **harmless(FRESH, "dt_init", "dt_scale"),
    **harmless(ROUNDING, "use_fast_path"),
}
MAMBA2: Table = {
    **LAYER,
    "d_state": Honoured(128, integer()),
    "headdim": Honoured(64, integer()),
    "ngroups": Honoured(1, integer()),
    "dt_limit": Honoured([0.0, float("inf")], mamba2.LIMIT),
    "rmsnorm": only(True),
    "norm_before_gate": only(False),
    "D_has_hdim": only(False),
    "d_ssm": only(None),
    **harmless(FRESH, "A_init_range", "conv_init"),
    **harmless(ROUNDING, "chunk_size", "use_mem_eff_path"),
}


def config_of(config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Fields of config.model. `vocab_size`: rows of the embedding, as the config has the number before padding."""
    theirs = read(config, MODEL, "state-spaces")
    ssm = theirs["ssm_cfg"] or {}
    second = ssm.get("layer") == "Mamba2"
    layer = read(ssm, MAMBA2 if second else MAMBA, "state-spaces")
    shared = dict(state=layer["d_state"], expand=layer["expand"], conv=layer["d_conv"])
    if second:
        inner, head_dim, groups = layer["expand"] * theirs["d_model"], layer["headdim"], layer["ngroups"]
        if inner % head_dim:
            refuse("headdim", head_dim, f"allowed: a divisor of expand * d_model = {inner}")
        if inner // head_dim % groups:
            refuse("ngroups", groups, f"allowed: a divisor of the number of heads, {inner // head_dim}")
        options = dict(**shared, head_dim=head_dim, groups=groups, norm_eps=EPSILON)
    else:
        options = dict(**shared, dt_rank=0 if layer["dt_rank"] == "auto" else layer["dt_rank"], norms="none")
    pattern = "mamba2" if second else "mamba"
    return dict(
        pattern=pattern,
        width=theirs["d_model"],
        repeats=theirs["n_layer"],
        vocab_size=vocab_size,
        norm_eps=EPSILON,
        tie_embeddings=theirs["tie_embeddings"],
        **{pattern: options},
    )
