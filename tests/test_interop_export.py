"""Every field of a model that can be exported, changed one at a time: transformers is the oracle.

Either transformers computes the same logits from what was exported, or a line names the field. The fields are the
declared ones (seqmodels/fields), so a new field fails here until the export knows it.
"""

import json
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from seqmodels.configs.base import base
from seqmodels.errors import UserError
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.gated_deltanet import GATED_DELTANET
from seqmodels.fields.mamba import MAMBA
from seqmodels.fields.mamba2 import MAMBA2
from seqmodels.fields.mlp import MLP
from seqmodels.fields.model import DENSE, IMPLEMENTATION, MODEL
from seqmodels.fields.moe import MOE
from seqmodels.fields.rglru import RGLRU
from seqmodels.fields.rwkv import RWKV
from seqmodels.fields.rwkv_channel import RWKV_CHANNEL
from seqmodels.interop import (
    experts,
    gpt_neox,
    huggingface,
    jamba,
    llama,
    mamba,
    mamba2,
    mixtral,
    olmo_hybrid,
    qwen3_next,
    recurrent_gemma,
    rwkv,
)
from seqmodels.interop.huggingface import from_huggingface, to_huggingface
from seqmodels.interop.stacking import unstack
from seqmodels.interop.table import Harmless
from seqmodels.model import build

pytestmark = pytest.mark.slow

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH = 24, 11
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (1, LENGTH))
TOLERANCE = 1e-4  # of the standard deviation of the logits

TINY = dict(width=16, repeats=1, tie_embeddings=False)
EXPERTS = dict(experts=3, top_k=2, hidden=24)
TRANSFORMER = dict(TINY, pattern="attention+mlp", attention=dict(kv_heads=2), mlp=dict(hidden=24))
MODELS = {
    "mamba": dict(TINY, pattern="mamba", mamba=dict(state=4)),
    "mamba2": dict(TINY, pattern="mamba2", mamba2=dict(state=4)),
    "transformer": TRANSFORMER,
    "gpt_neox": dict(
        TINY,
        **dict(pattern="attention|mlp", parallel_norms=True, norm="layer", bias=True),
        mlp=dict(hidden=24, gated=False),
    ),
    "mixtral": dict(
        TINY, pattern="attention+moe", attention=dict(kv_heads=2), moe=EXPERTS | {"router": "renormalised"}
    ),
    "recurrent_gemma": dict(
        TINY,
        **dict(pattern="rglru+mlp attention+mlp", norm="centred", bias=True, embedding_scale=4.0, logit_softcap=4.0),
        rglru=dict(hidden=24),
        attention=dict(kv_heads=2, window=4, biases="out"),
        mlp=dict(hidden=24, activation="gelu_tanh"),
    ),
    "olmo_hybrid": dict(
        TINY,
        **dict(pattern="gated_deltanet+mlp attention+mlp", norms_behind="attention"),
        gated_deltanet=dict(heads=4, key_heads=2, key_dim=6, value_dim=5),
        attention=dict(kv_heads=2, qk_norm="all", qk_norm_eps=1e-5),
        mlp=dict(hidden=24),
    ),
    "qwen3_next": dict(
        TINY,
        **dict(pattern="gated_deltanet+mlp attention+moe", norm="centred"),
        gated_deltanet=dict(heads=4, key_heads=2, key_dim=6, value_dim=5),
        attention=dict(kv_heads=2, qk_norm="centred", qk_norm_eps=1e-5, output_gate=True),
        mlp=dict(hidden=24),
        moe=EXPERTS | dict(shared=1, shared_gate=True),
    ),
    "rwkv": dict(
        TINY,
        **dict(pattern="rwkv+rwkv_channel x2", norm="layer", bias=True, embedding_norm=True),
        rwkv=dict(hidden=24),
        rwkv_channel=dict(hidden=32),
    ),
    "jamba": dict(
        TRANSFORMER | dict(pattern="mamba+mlp attention+moe"),
        attention=dict(kv_heads=2, positions="none"),
        mamba=dict(state=4, norms="learned"),
        moe=EXPERTS,
    ),
}
GROUPS = {  # our fields, and what the export does with them
    "mamba": [(MAMBA, mamba.EXPORTED)],
    "mamba2": [(MAMBA2, mamba2.EXPORTED)],
    "transformer": [
        (MODEL, huggingface.EXPORTED),
        (DENSE, huggingface.EXPORTED_DENSE),
        (ATTENTION, llama.EXPORTED_ATTENTION),
        (MLP, llama.EXPORTED_MLP),
    ],
    "gpt_neox": [(ATTENTION, gpt_neox.EXPORTED_ATTENTION), (MLP, gpt_neox.EXPORTED_MLP)],
    "recurrent_gemma": [
        (RGLRU, recurrent_gemma.EXPORTED_RGLRU),
        (ATTENTION, recurrent_gemma.EXPORTED_ATTENTION),
        (MLP, recurrent_gemma.EXPORTED_MLP),
    ],
    "olmo_hybrid": [(ATTENTION, olmo_hybrid.EXPORTED_ATTENTION)],  # the rest is that of qwen3_next
    "qwen3_next": [
        (GATED_DELTANET, qwen3_next.EXPORTED_GATED_DELTANET),
        (ATTENTION, qwen3_next.EXPORTED_ATTENTION),
        (MOE, qwen3_next.EXPORTED_MOE),
    ],
    "rwkv": [(RWKV, rwkv.EXPORTED_MIX), (RWKV_CHANNEL, rwkv.EXPORTED_MIX)],
    "mixtral": [(ATTENTION, llama.EXPORTED_ATTENTION), (MOE, mixtral.EXPORTED_MOE)],
    "jamba": [
        (ATTENTION, jamba.EXPORTED_ATTENTION),
        (MAMBA, jamba.EXPORTED_MAMBA),
        (MLP, jamba.EXPORTED_MLP),
        (MOE, jamba.EXPORTED_MOE),
    ],
}
# Other values of fields, where the next number or the next choice does not fit the rest of the model
CHANGED = {
    "model.width": [8],
    "model.pattern": [
        *("attention+mlp x2", "(attention+mlp) x1 attention+mlp", "attention", "mlp", "attention|mlp", "mlp+attention"),
        *("bi:attention+mlp", "attention+mlp mlp", "mamba attention+mlp", "mamba mamba2", "gla", "hgrn+mlp"),
    ],
    "model.vocab_size": [32],
    "model.norm_eps": [0.1],
    "model.norms_behind": ["mlp"],
    "model.residual_dtype": ["bfloat16"],
    "model.remat": ["block"],
    "model.scan_blocks": [1],
    "model.dense.variant": ["read", "rank"],
    "model.attention.heads": [8, 2],
    "model.attention.kv_heads": [1, 4],
    "model.attention.head_dim": [6],
    "model.attention.rope_theta": [50.0],
    "model.attention.window": [4, 1],
    "model.attention.rotary": [0.5, 1.0],
    "model.attention.init_std": [0.0],
    "model.short_conv": [3],
    "model.positions": ["sinusoidal"],
    "model.attention.rope_style": ["interleaved"],
    "model.attention.scaling": ["ntk"],
    "model.attention.scaling_factor": [2.0],
    "model.mlp.hidden": [0, 32],
    "model.mamba.state": [5],
    "model.mamba.norm_eps": [0.1],
    "model.mamba.conv": [3],
    "model.mamba.dt_min": [0.01],
    "model.mamba2.state": [5],
    "model.mamba2.norm_eps": [0.1],
    "model.mamba2.conv": [3],
    "model.mamba2.dt_min": [0.01],
    "model.mamba2.head_dim": [4],
    "model.mamba2.groups": [2],
    "model.moe.hidden": [0, 32],
    "model.attention.qk_norm_eps": [0.1],
    "model.gated_deltanet.heads": [2],
    "model.gated_deltanet.key_heads": [0, 1],
    "model.gated_deltanet.key_dim": [4],
    "model.gated_deltanet.value_dim": [0],
    "model.gated_deltanet.conv": [3],
    "model.gated_deltanet.norm_eps": [0.1],
    "model.gated_deltanet.dt_min": [0.01],
    "model.rglru.hidden": [0, 32],
    "model.rglru.heads": [2],
    "model.rglru.conv": [3],
    "model.rwkv.hidden": [0, 32],
    "model.rwkv_channel.hidden": [0, 24],
}
TOGETHER = [
    ("mamba", {"model.mamba.norms": "rms", "model.mamba.norm_eps": 0.1}),
    ("mamba", {"model.norm_eps": 0.1}),
    ("jamba", {"model.norm_eps": 0.1}),
    ("jamba", {"model.norm_eps": 0.1, "model.mamba.norm_eps": 0.1}),
    ("jamba", {"model.mlp.hidden": 32, "model.moe.hidden": 32}),
    ("jamba", {"model.tie_embeddings": True, "model.repeats": 2}),
    *(
        ("jamba", {"model.pattern": pattern})
        for pattern in (
            *("mamba+mlp", "mamba+moe attention+mlp", "attention+mlp attention+moe", "mamba+mlp attention+mlp x2"),
            *("(mamba+mlp) x4 attention@1/2 +moe@1/2", "attention+mlp mamba+mlp", "mamba+mlp|moe", "mamba+moe+mlp"),
        )
    ),
    *(
        ("gpt_neox", change)
        for change in (
            *({"model.bias": False}, {"model.norm": "rms"}, {"model.parallel_norms": False}, {"model.norm_eps": 0.1}),
            {"model.pattern": "attention+mlp", "model.parallel_norms": False, "model.tie_embeddings": True},
            {"model.pattern": "attention|mlp x2", "model.repeats": 2},
        )
    ),
    *(
        ("olmo_hybrid", change)
        for change in (
            *({"model.norm": "centred"}, {"model.bias": True}, {"model.norms_behind": ""}, {"model.mlp.gated": False}),
            *({"model.norms_behind": "mlp"}, {"model.attention.positions": "none"}, {"model.tie_embeddings": True}),
            {"model.norm_eps": 0.1, "model.attention.qk_norm_eps": 0.1},
            *({"model.gated_deltanet.negative_eigenvalues": True}, {"model.gated_deltanet.norm_eps": 0.1}),
        )
    ),
    *(
        ("qwen3_next", change)
        for change in (
            *({"model.norm": "rms"}, {"model.bias": True}, {"model.moe.shared": 0}, {"model.tie_embeddings": True}),
            {"model.norm_eps": 0.1, "model.attention.qk_norm_eps": 0.1, "model.gated_deltanet.norm_eps": 0.1},
            *({"model.pattern": "gated_deltanet+mlp"}, {"model.pattern": "attention+moe gated_deltanet+moe"}),
        )
    ),
    *(
        ("recurrent_gemma", change)
        for change in (
            *({"model.bias": False}, {"model.norm": "rms"}, {"model.norm_eps": 0.1}, {"model.embedding_scale": 1.0}),
            *({"model.logit_softcap": 0.0}, {"model.logit_softcap": 1.0}, {"model.tie_embeddings": True}),
            *({"model.attention.heads": 2, "model.rglru.heads": 2}, {"model.pattern": "rglru+mlp"}),
            *({"model.pattern": "rglru+mlp x2 attention+mlp", "model.repeats": 2}, {"model.attention.window": 0}),
        )
    ),
    *(
        ("rwkv", change)
        for change in (
            *({"model.bias": False}, {"model.norm": "rms"}, {"model.norm_eps": 0.1}, {"model.embedding_norm": False}),
            *({"model.tie_embeddings": True, "model.repeats": 2}, {"model.pattern": "rwkv+mlp"}),
        )
    ),
    ("mixtral", {"model.attention.window": 4, "model.norm_eps": 0.1}),
    ("mixtral", {"model.bias": True}),
    ("mamba", {"model.norm": "layer"}),
    ("mamba", {"model.pattern": "mamba x2", "model.tie_embeddings": True}),
    ("mamba2", {"model.norm_eps": 0.1}),
    ("mamba2", {"model.norm_eps": 0.1, "model.mamba2.norm_eps": 0.1}),
    ("transformer", {"model.bias": True, "model.attention.window": 4}),
    ("transformer", {"model.mlp.activation": "gelu", "model.attention.window": 4}),
    ("transformer", {"model.norm": "layer", "model.bias": True}),
    *(("transformer", {f"model.implementation.{name}": "reference"}) for name in IMPLEMENTATION.fields),
]


def others(place, field):
    """Other values of a field that our models can have."""
    if place in CHANGED:
        return CHANGED[place]
    if isinstance(field.default, bool):
        return [not field.default]
    if field.allowed.choices:
        return [value for value in field.allowed.choices if value != field.default]
    return [0.5 * field.default + 0.25 if isinstance(field.default, float) else field.default + 1]


SHARED = {**llama.PLAIN_ATTENTION, **experts.EXPORTED}  # what several tables say
HYBRIDS = ("recurrent_gemma", "olmo_hybrid", "qwen3_next")  # in which that is not tested again, and no harmless field
CASES = [
    (kind, {group.place(name): value})
    for kind, groups in GROUPS.items()
    for group, table in groups
    for name, field in group.fields.items()
    if not (kind in HYBRIDS and (table[name] is SHARED.get(name) or isinstance(table[name], Harmless)))
    for value in others(group.place(name), field)
] + TOGETHER


def config_of(kind, change):
    """config.model, with every field of its branches."""
    config = base().model
    config.update(MODELS[kind])
    for place, value in change.items():
        *group, name = place.split(".")[1:]
        options = config[group[0]] if group and group[0] in config else config
        if group and options is config:
            config[group[0]] = options = type(config)()
        options[name] = value
    return config


def params_of(model):
    """Parameters of a model, drawn so that all of them matter."""
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    random = np.random.default_rng(1)

    def draw(path, leaf):
        noise = random.normal(size=leaf.shape).astype(np.float32) * np.float32(0.3 if len(leaf.shape) > 1 else 0.2)
        return noise + np.float32(path[-1].key in ("scale", "D"))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def our_logits(config, params):
    model = build(dict(config, dtype="float32", residual_dtype="float32"), VOCABULARY)
    hidden, _ = model.apply({"params": params}, jnp.asarray(TOKENS, jnp.int32))
    return np.asarray(model.apply({"params": params}, hidden, method="logits"))


def their_logits(tensors, config, directory):
    (directory / "config.json").write_text(json.dumps(config))
    # of these a file has other names than a model in memory
    if any(".experts." in name or ".q_conv1d." in name or name == "embed_out.weight" for name in tensors):
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
        with torch.no_grad():
            return model(torch.from_numpy(TOKENS), use_cache=False).logits.numpy()
    settings = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == tensors.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(tensors[name]))
        return model(torch.from_numpy(TOKENS), use_cache=False).logits.numpy()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Of torch: these models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def name_of(case):
    return f"{case[0]}-" + ",".join(f"{place}={value!r}" for place, value in case[1].items())


@pytest.mark.parametrize("kind, change", CASES, ids=map(name_of, CASES))
@pytest.mark.filterwarnings("ignore")
def test_export_equals_transformers_or_names_the_field(kind, change, tmp_path):
    config = config_of(kind, change)
    try:
        model = build(config, VOCABULARY)
        config = model.config
    except UserError:  # no language model at all: refused for any parameters
        model = build(config_of(kind, {}), VOCABULARY)
    params = params_of(model)
    try:
        tensors, theirs = to_huggingface(unstack(params), config)
    except UserError as error:
        assert "\n" not in str(error)
        assert any(place in str(error) for place in change), error
        return
    want = our_logits(config, params)
    assert want.std() > 0.3
    error = np.abs(their_logits(tensors, theirs, tmp_path) - want).max() / want.std()
    assert error < TOLERANCE, f"{error:.1e} of the standard deviation"
    _, again = from_huggingface(tensors, theirs)
    jax.tree.map(np.testing.assert_array_equal, again, unstack(params))


@pytest.mark.parametrize("kind", GROUPS)
def test_every_field_of_ours_is_decided(kind):
    for group, table in GROUPS[kind]:
        undecided = group.fields.keys() ^ table.keys()
        assert not undecided, f"seqmodels/interop: what becomes of {', '.join(map(group.place, undecided))}?"


def test_a_parameter_that_no_tensor_holds_is_named():
    config = build(config_of("transformer", {}), VOCABULARY).config
    params = params_of(build(config_of("transformer", {"model.bias": True}), VOCABULARY))
    with pytest.raises(UserError, match=r"parameters: block_0/m\w+/\w+_bias cannot be exported"):
        to_huggingface(params, config)
    with pytest.raises(UserError, match=r"embedding has shape \(24, 16\); config.model asks for \(40, 16\)"):
        to_huggingface(params, config.to_dict() | {"vocab_size": 40})
    with pytest.raises(UserError, match=r"model\.new is 3; the export does not know this field"):
        to_huggingface(params, config.to_dict() | {"new": 3})
