"""The values that fields of a config may have, and the messages for others."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from seqmodels import depth
from seqmodels.branches import BRANCHES
from seqmodels.config import declared_fields, validate
from seqmodels.configs import base
from seqmodels.errors import UserError
from seqmodels.fields import group
from seqmodels.model import OPERATIONS, build, describe_kernels
from tests.presets import NAMES, config_of


def set_field(config, field, value):
    with config.unlocked(), config.ignore_type():
        *parents, last = field.split(".")
        for parent in parents:
            config = config[parent]
        config[last] = value


# Kernels


def test_every_operation_has_its_field():
    assert set(config_of("mamba").model.implementation) == set(OPERATIONS)
    used = {name for branch in BRANCHES.values() for name in branch.operations}
    for connection, operation in (("hyper", "hyper_connection"), ("attnres", "attn_residual")):
        named = dict(depth=connection, dense=dict(variant="none"), implementation={operation: "reference"})
        used |= set(depth.operations(ConfigDict(named)))
    assert set(OPERATIONS) == used


@pytest.mark.parametrize("broken, named", [("short_conv", "selective_scan"), ("selective_scan", "short_conv")])
def test_one_operation_can_be_named_alone(monkeypatch, broken, named):
    """The xla backend of the other operation is what it takes by itself: broken, it is missed."""
    config = config_of("densemamba").model
    config.width, config.repeats = 32, 2
    monkeypatch.setitem(OPERATIONS[broken].BACKENDS, "xla", None)

    def shapes():
        return jax.eval_shape(build(config, 257).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))

    config.implementation[named] = "reference"
    with pytest.raises(AttributeError):
        shapes()
    config.implementation[broken] = "reference"
    assert shapes()


def test_kernels_are_described():
    config = config_of("mamba").model
    config.implementation.short_conv = "reference"
    scan, conv = describe_kernels(config, "cpu")
    assert conv == "short_conv: reference (model.implementation.short_conv)"
    assert scan == "selective_scan: xla (first choice on cpu)"
    for platform in ("cpu", "gpu", "tpu"):
        lines = describe_kernels(config_of("densemamba").model, platform)
        assert [line.split(":")[0] for line in lines] == ["selective_scan", "short_conv"]
        (line,) = describe_kernels(config_of("transformer").model, platform)
        assert line.startswith("attention: ")


def test_an_unknown_implementation_is_refused():
    config = config_of("mamba").model
    config.implementation.selective_scan = "cuda"
    with pytest.raises(
        UserError, match=r"model.implementation.selective_scan='cuda': must be '' or one of 'reference',"
    ):
        build(config, 257)


# Validation

# What may be given, said once more: seqmodels/fields must agree.
CONBAS = ("conba", "conba_seq")  # these have many fields in common
CHOICES = {
    "platform": ("", "cpu", "gpu", "tpu"),
    "model.norm": ("rms", "layer"),
    "model.input": ("tokens", "frames", "one_hot"),
    "model.head": ("next_token", "classify", "regress", "forecast"),
    "model.pool": ("mean", "last", "attention"),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "model.residual_dtype": ("float32", "bfloat16", "float16"),
    "model.remat": ("none", "rescan", "mixer", "projected", "scan", "block", "dots", "streams"),
    "model.dense.variant": ("none", "read", "input", "output", "rank", "carry"),
    "model.dense.gate": ("channel", "state", "both", "none"),
    "model.dense.activation": ("silu", "sigmoid", "identity"),
    "model.dense.projection": ("identity", "linear"),
    "model.mamba.norms": ("none", "rms", "learned"),
    "model.attention.positions": ("rope", "none", "xpos", "alibi", "kerple", "sandwich", "t5"),
    "model.attention.rope_style": ("half", "interleaved"),
    "model.attention.scaling": ("none", "linear", "ntk", "yarn", "llama3", "rerope", "leaky_rerope"),
    "model.positions": ("none", "learned", "sinusoidal"),
    "model.attention.mask": ("causal", "strided", "fixed", "bigbird"),
    "model.attention.qk_norm": ("none", "rms"),
    "model.moe.router": ("softmax", "renormalised", "sigmoid"),
    "model.s5.discretization": ("zoh", "bilinear"),
    "model.s5.activation": ("half_glu1", "half_glu2", "full_glu", "gelu"),
    "model.s5.C_init": ("trunc_standard_normal", "lecun_normal", "complex_normal"),
    "model.s5.rates": ("standard", "BandCdecay", "BfastandCdecay", "noBCdecay"),
    "model.conba.control": ("off", "output", "input"),
    "model.conba.rule": ("nlms", "published"),
    "model.conba.state_eval": ("exact", "folded"),
    "model.conba_seq.fd": ("identity", "linear", "mlp"),
    "model.conba_seq.h": ("linear", "mlp"),
    "model.conba_seq.control": ("off", "input"),
    "model.conba_seq.rule": ("nlms", "published", "mit"),
    "model.conba_seq.stability": ("none", "spectral"),
    **{f"model.{name}.norms": ("none", "rms", "learned") for name in CONBAS},
    **{f"model.{name}.scaling": ("gate", "literal", "off") for name in CONBAS},
    **{f"model.{name}.gain": ("input", "scalar") for name in CONBAS},
    "model.retnet.schedule": ("octaves", "spread"),
    "model.retnet.activation": ("identity", "silu"),
    **{f"model.{name}.candidate": ("linear", "positive") for name in ("mingru", "minlstm")},
    **{f"model.{name}.init_A": ("legs", "lin", "inv", "real") for name in ("h3", "s4d")},
    **{f"model.{name}.rule": ("zoh", "bilinear") for name in ("h3", "s4d")},
    "model.linear_attention.feature_map": ("elu", "relu", "softmax", "taylor"),
    "model.mamba3.rotated": (0.5, 1.0),
    "model.mamba3.A_activation": ("heavy_tail", "softplus"),
    "model.mlp.activation": ("silu", "gelu", "relu"),
    "optimizer.schedule": ("cosine", "wsd", "constant"),
    "training.nan": ("stop", "skip"),
    "training.debug": ("", "nans", "shapes", "nojit"),
}
CONVS = tuple(
    f"model.{name}.conv"
    for name in ("mamba", "mamba2", "deltanet", "gated_deltanet", "rglru", "cnn", "h3", "hyena", *CONBAS)
)
LINEAR = ("h3", "s4", "s4d")  # systems that do not depend on the token
SMALLEST = {
    0: (
        *("model.vocab_size", "model.remat_blocks", "model.scan_blocks"),
        *("model.dense.bottleneck_state", "model.dense.gate_std"),
        *("model.mamba.dt_rank", "model.mamba.dt_floor", "model.mamba2.dt_floor", "model.mamba3.dt_floor"),
        *("model.attention.kv_heads", "model.attention.head_dim", "model.attention.window", "model.mlp.hidden"),
        *("model.attention.sinks", "model.attention.first", "model.attention.random"),
        *("model.attention.softcap", "model.attention.log_n", "model.logit_softcap"),
        *("model.attention.init_std", "model.attention.trained_length", "model.position_table"),
        *("model.moe.hidden", "model.moe.shared", "model.moe.capacity"),
        *("model.moe.balance", "model.moe.z_loss", "model.moe.bias_rate"),
        *("model.performer.redraw", "model.gla.key_dim", "model.gla.value_dim", "model.conba.delay"),
        *(f"model.{name}.hidden" for name in ("gru", "hgrn", "lstm", "mingru", "minlstm")),
        *("model.lstm.forget_bias", "model.minlstm.forget_bias"),
        *(f"model.{name}.hidden" for name in ("rglru", "rwkv", "rwkv_channel")),
        *(f"model.{name}.{field}" for name in CONBAS for field in ("dt_rank", "dt_floor")),
        *(f"model.{name}.{field}_noise" for name in CONBAS for field in ("process", "observation")),
        *("model.retnet.key_dim", "model.retnet.value_dim", "model.retnet.init_std"),
        *("model.deltanet.key_dim", "model.deltanet.value_dim", "model.gated_deltanet.key_heads"),
        *("model.gated_deltanet.key_dim", "model.gated_deltanet.value_dim", "model.gated_deltanet.dt_floor"),
        *("optimizer.warmup", "optimizer.decay", "optimizer.floor", "optimizer.weight_decay", "optimizer.clip"),
        *("training.z_loss", "training.loss_chunk", "training.profile_start", "checkpoint.keep_every"),
        *("training.hang_after", "training.recheck_every"),
        *(
            "evaluation.every",
            "evaluation.limit",
            "evaluation.batch_size",
            "evaluation.qa_shots",
            "evaluation.qa_length",
            "sample.tokens",
            "sample.temperature",
            "sample.top_k",
        ),
    ),
    1: (
        *(
            "steps",
            "batch_size",
            "seq_len",
            "model.width",
            "model.repeats",
            "model.vocab_multiple",
            "model.horizon",
            "model.patch",
        ),
        *(
            "model.dense.depth",
            "model.dense.every",
            "model.dense.bottleneck",
            "model.attnres.blocks",
            "model.hyper.streams",
        ),
        *("model.mamba.state", "model.mamba.expand", "model.moe.experts", "model.moe.top_k"),
        *("model.mamba2.state", "model.mamba2.expand", "model.mamba2.head_dim", "model.mamba2.groups"),
        *(f"model.hyena.{field}" for field in ("length", "filter_width", "bands")),
        *("model.mamba3.state", "model.mamba3.expand", "model.mamba3.head_dim", "model.mamba3.groups"),
        *("model.linear_attention.heads", "model.performer.heads", "model.performer.random_features"),
        *("model.gla.heads", "model.gla.gate_rank", "model.gla.gate_divisor", "model.conba.sweeps"),
        *(f"model.{name}.{field}" for name in CONBAS for field in ("state", "expand", "head_dim")),
        "model.attention.scaling_factor",
        *("model.attention.block", "model.attention.stride", "model.attention.summary", "model.attention.near"),
        *("model.retnet.heads", "model.rglru.heads", "model.attention.heads"),
        *("model.deltanet.heads", "model.gated_deltanet.heads", "model.s5.blocks"),
        *("training.accumulate", "data.shuffle_buffer", "training.profile_steps"),
        *("mesh.fsdp", "mesh.tensor", "mesh.sequence", "mesh.expert"),
        *("checkpoint.every", "checkpoint.keep", "evaluation.rows", "metrics.every"),
        *("evaluation.qa_tokens", "evaluation.qa_repeat"),
        *("evaluation.throughput.tokens", "evaluation.throughput.repeats"),
    ),
    2: (*CONVS, *(f"model.{name}.state" for name in LINEAR), "model.s5.state"),
}
LARGEST = {
    8: CONVS,
    1: ("model.attention.rotary", "optimizer.decay", "optimizer.floor", "sample.top_p"),
    1024: tuple(f"model.{name}.state" for name in LINEAR),
}
POSITIVE = (
    *(
        "model.embedding_std",
        "model.embedding_scale",
        "model.norm_eps",
        "model.dense.norm_eps",
        "optimizer.learning_rate",
        "optimizer.eps",
    ),
    *("model.mamba.norm_eps", "model.mamba2.norm_eps", "model.mamba3.norm_eps", "model.gla.norm_eps"),
    *("model.retnet.norm_eps", "model.mamba.dt_min", "model.mamba.dt_max", "model.attention.rope_theta"),
    *("model.attention.rotary", "model.attention.qk_norm_eps"),
    *("model.mamba2.dt_min", "model.mamba2.dt_max", "model.mamba3.dt_min", "model.mamba3.dt_max"),
    *("model.deltanet.norm_eps", "model.gated_deltanet.norm_eps", "model.hgrn.norm_eps", "model.moe.scale"),
    *("model.mamba.dt_scale", "model.mamba2.dt_scale", "model.mamba3.dt_scale", "model.rescale"),
    *("model.gated_deltanet.dt_min", "model.gated_deltanet.dt_max", "model.hyena.frequency"),
    *(f"model.{name}.{field}" for name in (*LINEAR, "s5") for field in ("dt_min", "dt_max", "dt_scale")),
    *(f"model.{name}.{field}" for name in CONBAS for field in ("norm_eps", "dt_min", "dt_max")),
)
SHARES = ("model.dropout", "optimizer.b1", "optimizer.b2", "optimizer.ema", "optimizer.muon")  # at least 0, less than 1


OTHERS = ("seed", "model.performer.seed", "mesh.data", "model.short_conv")  # which have tests of their own or need none


@pytest.mark.parametrize("taps", [-1, 1, 9])
def test_taps_of_short_convolutions(taps):
    config = with_field("model.short_conv")
    set_field(config, "model.short_conv", taps)
    assert f"config.model.short_conv={taps}: must be 0, or from 2 to 8" in refusal(config)


def test_blocks_whose_norms_are_behind_their_branches_are_in_the_pattern():
    config = with_field("model.norms_behind")
    set_field(config, "model.norms_behind", "gru")
    assert "config.model.norms_behind='gru': must be '' or some of " in refusal(config)


def with_field(field):
    """A config that has the field."""
    parents, _, last = field.rpartition(".")
    return next(config for config in map(config_of, NAMES) if last in config_part(config, parents))


def config_part(config, dotted):
    for name in dotted.split(".") if dotted else ():
        config = config.get(name, {})
    return config


def refusal(config):
    with pytest.raises(UserError) as error:
        validate(config)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_every_declared_option_of_a_branch_is_in_some_config():
    """So the command line can set it, and --help tells of it."""
    everywhere = [dict(flat(config_of(name))) for name in NAMES]
    for branch in BRANCHES:
        for field in group(branch).fields:
            assert any(f"model.{branch}.{field}" in config for config in everywhere), (branch, field)


def flat(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_every_field_of_every_config_is_declared():
    for name in (*NAMES, "synthetic"):
        config = config_of(name)
        fields = {field for field, _ in flat(config) if not field.startswith("data.task.")}
        assert fields == set(declared_fields(config)), name


@pytest.mark.parametrize("field", sorted(CHOICES))
def test_choices_are_refused_by_name(field):
    config = with_field(field)
    set_field(config, field, "nonesuch")
    message = refusal(config)
    assert f"config.{field}='nonesuch': must be one of " in message
    assert all(repr(choice) in message for choice in CHOICES[field])
    for choice in CHOICES[field]:
        declared_fields(config)[field].check(field, choice)


@pytest.mark.parametrize("smallest, field", [(n, field) for n, fields in SMALLEST.items() for field in fields])
def test_numbers_below_the_smallest_are_refused(smallest, field):
    config = with_field(field)
    set_field(config, field, smallest - 1)
    message = refusal(config)
    assert f"config.{field}={dict(flat(config))[field]}: must be " in message  # 0.0 of a field that is a float
    assert f"at least {smallest}" in message or f"between {smallest} and" in message
    declared_fields(config)[field].check(field, smallest)


@pytest.mark.parametrize("largest, field", [(n, field) for n, fields in LARGEST.items() for field in fields])
def test_numbers_above_the_largest_are_refused(largest, field):
    config = with_field(field)
    set_field(config, field, largest + 1)
    message = refusal(config)
    assert (
        f"config.{field}={dict(flat(config))[field]}: must be " in message
        and str(largest) in message.split("must be")[1]
    )
    declared_fields(config)[field].check(field, largest)


def test_every_number_that_a_config_holds_has_a_case_here():
    """But for OTHERS: seeds may be anything, and the rest has tests of its own."""
    cases = {
        *POSITIVE,
        *SHARES,
        *(field for table in (SMALLEST, LARGEST) for fields in table.values() for field in fields),
    }
    for name in NAMES:
        config = config_of(name)
        numbers = {
            field for field, value in flat(config) if isinstance(value, (int, float)) and value is not bool(value)
        }
        assert numbers - cases - {*CHOICES, *OTHERS} == set(), name


@pytest.mark.parametrize("field", sorted((*POSITIVE, *SHARES)))
@pytest.mark.parametrize("value", [float("nan"), -0.5, float("inf")])
def test_numbers_that_are_no_finite_share_or_size_are_refused(field, value):
    config = with_field(field)
    set_field(config, field, value)
    allowed = "greater than 0" if field in POSITIVE else "at least 0 and less than 1"
    assert f"config.{field}={value}: must be " in (message := refusal(config)) and allowed in message
    for good in (1e-6, 0.5):
        declared_fields(config)[field].check(field, good)


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("steps", "many", "an integer, at least 1"),
        ("steps", 2.5, "an integer, at least 1"),
        ("steps", True, "an integer, at least 1"),
        ("model.tie_embeddings", 1, "True or False"),
        ("data.path", 3, "a text"),
        ("optimizer.clip", "high", "a number, at least 0"),
        ("optimizer.clip", float("nan"), "a number, at least 0"),
        ("evaluation.lengths", 4, "a list, multiples of seq_len"),
        ("evaluation.lengths", (1, "4"), "multiples of seq_len"),
        ("model.mamba.state", 16.5, "an integer, at least 1"),
        ("optimizer.groups", "ssm=", "GROUP=FACTOR"),
        ("optimizer.groups", "ssm=a half", "GROUP=FACTOR"),
    ],
)
def test_values_of_another_type_are_refused(field, value, allowed):
    config = with_field(field)
    set_field(config, field, value)
    assert refusal(config).startswith(f"config.{field}={value!r}: must be {allowed}")


def test_factors_of_learning_rates():
    config = config_of("mamba")
    for text in ("", "ssm=0.1", "ssm=.1,embedding=5e-1, norm=2"):
        config.optimizer.groups = text
        validate(config)


@pytest.mark.parametrize(
    "name, field, value, allowed",
    [
        ("densemamba", "steps", 0, "at least 1"),
        ("densemamba", "batch_size", -8, "at least 1"),
        ("densemamba", "seq_len", 0, "at least 1"),
        ("densemamba", "model.repeats", 0, "at least 1"),
        ("densemamba", "model.dense.depth", 0, "at least 1"),
        ("densemamba", "model.dense.bottleneck", 256, "model.width=128"),
        ("densemamba", "model.scan_blocks", 3, "model.repeats=4"),
        ("densemamba", "model.pattern", "", "at least one block"),
        ("densemamba", "model.pattern", "mamba mmaba", "mamba"),
        ("densemamba", "model.dropout", 1.0, "less than 1"),
        ("densemamba", "training.accumulate", 3, "multiple of training.accumulate=3"),
        ("densemamba", "optimizer.learning_rate", 0.0, "greater than 0"),
        ("densemamba", "optimizer.learning_rate", float("nan"), "greater than 0"),
        ("densemamba", "optimizer.b2", 1.0, "less than 1"),
        ("densemamba", "optimizer.floor", 1.5, "between 0 and 1"),
        ("densemamba", "evaluation.lengths", (), "multiples of seq_len"),
        ("densemamba", "evaluation.lengths", (1, 0), "multiples of seq_len"),
        ("densemamba", "mesh.data", 0, "at least 1, or -1"),
        ("densemamba", "mesh.tensor", 0, "at least 1"),
        ("densemamba", "sample.top_p", 1.5, "at most 1"),
        ("transformer", "training.bptt", True, "False with attention"),
        ("transformer", "model.attention.heads", 5, "divisor of model.width=128"),
        ("transformer", "model.attention.kv_heads", 3, "divisor of heads=4"),
        ("transformer", "model.attention.head_dim", 31, "even"),
        ("pythia", "model.attention.rotary", 0.1, "an even number of channels, not 3"),
        ("transformer", "model.parallel_norms", True, "without branches side by side"),
        ("performer", "model.performer.heads", 3, "divisor of model.width=128"),
        ("linear_attention", "model.linear_attention.heads", 3, "divisor of model.width=128"),
        ("deltanet", "model.deltanet.heads", 3, "divisor of model.width=128"),
        ("gated_deltanet", "model.gated_deltanet.heads", 5, "3/4 of model.width=128 divide"),
        ("gated_deltanet", "model.gated_deltanet.key_heads", 3, "divisor of heads=4"),
        ("gated_deltanet", "model.gated_deltanet.dt_max", 1e-4, "at least dt_min=0.001"),
        ("retnet", "model.retnet.heads", 3, "divisor of model.width=128"),
        ("retnet", "model.retnet.key_dim", 7, "even"),
        ("denseretnet", "model.dense.variant", "carry", "with retnet in model.pattern"),
        ("denseretnet", "model.dense.projection", "linear", "'identity' with retnet in model.pattern"),
        ("transformer", "model.dense.variant", "read", "'none' without one of h3, mamba, mamba2, retnet, s4, s4d"),
    ],
)
def test_bad_values_are_refused_with_field_value_and_what_is_allowed(name, field, value, allowed):
    config = config_of(name)
    set_field(config, field, value)
    with pytest.raises(UserError) as error:
        validate(config)
    message = str(error.value)
    named = "batch_size" if field == "training.accumulate" else field
    assert f"config.{named}=" in message and allowed in message and "\n" not in message
    assert repr(value) in message


# ml_collections 1.1.0 loads config files with a method that Python 3.12 drops, and has another way there
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_flags_take_presets_and_overrides():
    import absl.flags

    file = pathlib.Path(base.__file__).with_name("densemamba.py")
    argv = ["train.py", f"--config={file}:130m", "--config.steps=7", "--config.evaluation.lengths=(1,8)"]
    flags = absl.flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=flags, sys_argv=argv)
    flags(argv)
    assert (flags.config.steps, flags.config.model.width, flags.config.evaluation.lengths) == (7, 768, (1, 8))
    validate(flags.config)
