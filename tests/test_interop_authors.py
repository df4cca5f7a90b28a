"""Configs of Mamba's and of DenseRetNet's authors, one field changed at a time.

Their code is not installed here. Which fields there are, and their defaults, was read in mamba_ssm
(models/config_mamba.py, models/mixer_seq_simple.py, modules/mamba_simple.py and mamba2.py) and in DenseSSM's
modeling_dense_gau_retnet.py.
"""

import numpy as np
import pytest

from seqmodels.errors import UserError
from seqmodels.interop import denseretnet, original
from seqmodels.interop.table import Harmless, Honoured, Only

MAMBA = dict(d_model=16, n_layer=2, vocab_size=17, ssm_cfg={})
MAMBA2 = dict(MAMBA, ssm_cfg=dict(layer="Mamba2", headdim=8))

# a field, another value, and what becomes of it in our config (a dotted name and its value)
HONOURED = [
    (MAMBA, "d_model", 32, {"width": 32}),
    (MAMBA, "n_layer", 3, {"repeats": 3}),
    (MAMBA, "tie_embeddings", False, {"tie_embeddings": False}),
    (MAMBA, "ssm_cfg", None, {}),
    (MAMBA, "ssm_cfg.d_state", 8, {"mamba.state": 8}),
    (MAMBA, "ssm_cfg.d_conv", 3, {"mamba.conv": 3}),
    (MAMBA, "ssm_cfg.expand", 3, {"mamba.expand": 3}),
    (MAMBA, "ssm_cfg.dt_rank", 5, {"mamba.dt_rank": 5}),
    (MAMBA, "ssm_cfg.layer", "Mamba1", {}),
    (MAMBA2, "ssm_cfg.d_state", 8, {"mamba2.state": 8}),
    (MAMBA2, "ssm_cfg.d_conv", 3, {"mamba2.conv": 3}),
    (MAMBA2, "ssm_cfg.expand", 3, {"mamba2.expand": 3}),
    (MAMBA2, "ssm_cfg.headdim", 4, {"mamba2.head_dim": 4}),
    (MAMBA2, "ssm_cfg.ngroups", 2, {"mamba2.groups": 2}),
    (MAMBA2, "ssm_cfg.dt_limit", [0.0, float("inf")], {}),
]
REFUSED = [
    (MAMBA, "rms_norm", False),
    (MAMBA, "attn_layer_idx", [1]),
    (MAMBA, "d_intermediate", 32),
    (MAMBA, "d_model", 0),
    (MAMBA, "a_field_that_nobody_knows", 3),
    (MAMBA, "ssm_cfg", "Mamba2"),
    (MAMBA, "ssm_cfg.layer", "Mamba3"),
    (MAMBA, "ssm_cfg.bias", True),
    (MAMBA, "ssm_cfg.conv_bias", False),
    (MAMBA, "ssm_cfg.headdim", 4),
    (MAMBA, "ssm_cfg.dt_rank", 0),
    (MAMBA2, "ssm_cfg.rmsnorm", False),
    (MAMBA2, "ssm_cfg.norm_before_gate", True),
    (MAMBA2, "ssm_cfg.D_has_hdim", True),
    (MAMBA2, "ssm_cfg.d_ssm", 16),
    (MAMBA2, "ssm_cfg.dt_limit", [0.0, 0.1]),
    (MAMBA2, "ssm_cfg.headdim", 5),
    (MAMBA2, "ssm_cfg.ngroups", 3),
    (MAMBA2, "ssm_cfg.bias", True),
]


def changed(config, name, value):
    group, _, field = name.rpartition(".")
    return {**config, group: {**config[group], field: value}} if group else {**config, field: value}


def flat(fields):
    groups = {name: value if isinstance(value, dict) else None for name, value in fields.items()}
    inner = {f"{name}.{field}": value for name, group in groups.items() if group for field, value in group.items()}
    return {name: value for name, value in fields.items() if groups[name] is None} | inner


@pytest.mark.parametrize("config, name, value, ours", HONOURED)
def test_honoured_fields_of_mambas_authors(config, name, value, ours):
    want = flat(original.config_of(config, 24)) | ours
    assert flat(original.config_of(changed(config, name, value), 24)) == want


@pytest.mark.parametrize("config, name, value", REFUSED)
def test_refused_fields_of_mambas_authors(config, name, value):
    with pytest.raises(UserError, match=rf"Hugging Face config: {name.rpartition('.')[2]} is "):
        original.config_of(changed(config, name, value), 24)


def test_harmless_fields_of_mambas_authors():
    for config, table, group in (
        (MAMBA, original.MODEL, ""),
        (MAMBA, original.MAMBA, "ssm_cfg."),
        (MAMBA2, original.MAMBA2, "ssm_cfg."),
    ):
        for name, entry in table.items():
            if isinstance(entry, Harmless) and name not in original.COMMON:
                change = changed(config, f"{group}{name}", 5)
                assert original.config_of(change, 24) == original.config_of(config, 24), name


def test_every_field_of_mambas_authors_is_tried():
    tried = {name.rpartition(".")[2] for _, name, *_ in [*HONOURED, *REFUSED]}
    for table in (original.MODEL, original.MAMBA, original.MAMBA2):
        shared = original.COMMON.keys() if table is original.MODEL else ()
        named = {name for name, entry in table.items() if isinstance(entry, Honoured | Only) and name not in shared}
        assert named <= tried


DENSE = dict(model_type="llama", dense_block_layers=2)


def dense_tensors():
    """Shapes of a DenseRetNet of width 8 with 2 heads of 2 keys and 8 values."""
    mixer = "model.layers.0.self_attn."
    shapes = {
        "model.embed_tokens.weight": (9, 8),
        f"{mixer}q_proj.weight": (4, 8),
        f"{mixer}to_out.0.weight": (8, 16),
        f"{mixer}group_norm.weight": (8,),
        f"{mixer}k_select.fc1.weight": (4, 8),
        f"{mixer}v_select.fc1.weight": (2, 8),
    }
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "name, value",
    [
        *[("hidden_size", 16), ("num_hidden_layers", 2), ("num_attention_heads", 4), ("query_key_dim", 8)],
        *[("v_factor", 3), ("dense_block_layers", 0), ("rms_norm_eps", 0), ("tie_word_embeddings", True)],
        *[("quantization_config", {"bits": 4}), ("a_field_that_nobody_knows", 3)],
    ],
)
def test_refused_fields_of_denseretnet(name, value):
    with pytest.raises(UserError, match=f"Hugging Face config: {name} is "):
        denseretnet.config_of(dense_tensors(), {**DENSE, name: value})


def test_honoured_and_harmless_fields_of_denseretnet():
    fields = denseretnet.config_of(dense_tensors(), DENSE)
    same = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, query_key_dim=4, v_factor=2)
    harmless = {name: 5 for name, entry in denseretnet.TABLE.items() if isinstance(entry, Harmless)}
    assert denseretnet.config_of(dense_tensors(), {**harmless, **DENSE, **same}) == fields
    epsilon = denseretnet.config_of(dense_tensors(), {**DENSE, "rms_norm_eps": 1e-3})
    places = {name for name, value in flat(epsilon).items() if flat(fields)[name] != value}
    assert places == {"norm_eps", "retnet.norm_eps", "dense.norm_eps"}
