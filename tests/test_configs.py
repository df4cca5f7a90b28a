import importlib
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from seqmodels.config import CHOICES, POSITIVE, RANGES, SHARES, blocks, validate
from seqmodels.configs import base
from seqmodels.errors import UserError
from seqmodels.mixers import MIXERS
from seqmodels.model import OPERATIONS, build, describe_kernels
from tests.golden.regenerate import HERE, every_config

REGENERATE = "if the change is meant: python tests/golden/regenerate.py, and look through the diff"
CONFIGS = every_config()
NAMES = (
    *("densemamba", "denseretnet", "gla", "linear_attention", "mamba", "mamba2", "mamba3"),
    *("performer", "retnet", "transformer"),
)
LARGE = {"denseretnet": "350m", "gla": "340m", "retnet": "200m"}  # a preset of a paper's size, where it is not 130m


def config_of(name, arg=None):
    return importlib.import_module(f"seqmodels.configs.{name}").get_config(arg)


def set_field(config, field, value):
    with config.unlocked(), config.ignore_type():
        *parents, last = field.split(".")
        for parent in parents:
            config = config[parent]
        config[last] = value


def has_field(config, field):
    *parents, last = field.split(".")
    for parent in parents:
        config = config.get(parent, {})
    return last in config


def test_every_preset_has_its_golden_file():
    assert {path.name for path in HERE.glob("*.json")} == set(CONFIGS), REGENERATE


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_golden(name):
    assert json.loads((HERE / name).read_text()) == json.loads(CONFIGS[name]), f"{name} changed; {REGENERATE}"


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_preset_is_valid_and_locked(name):
    config = config_of(*pathlib.Path(name).stem.split("-", 1))
    validate(config)
    with pytest.raises(AttributeError, match="batchsize"):
        config.batchsize = 3
    with pytest.raises(TypeError):
        config.steps = "many"


@pytest.mark.parametrize("name", NAMES)
def test_no_argument_is_the_small_preset(name):
    assert config_of(name) == config_of(name, "small") and config_of(name).name == name


@pytest.mark.parametrize("arg, near", [("140m", "130m"), ("1.4B", "1.4b"), ("smal", "small"), ("zzzzzz", "small, 25m")])
def test_unknown_preset_names_the_nearest(arg, near):
    with pytest.raises(ValueError, match=near) as error:
        config_of("densemamba", arg)
    assert "\n" not in str(error.value) and arg in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_trial_of_the_sweep_is_a_valid_config_of_its_own(name):
    for arg in (None, LARGE.get(name, "130m")):
        trials = []
        importlib.import_module(f"seqmodels.configs.{name}").sweep(trials.append, arg)
        resolved = set()
        for trial in trials:
            config = config_of(name, arg)
            config.update_from_flattened_dict(trial)  # refuses unknown fields and other types
            validate(config)
            build(config.model, 257)
            resolved.add(config.to_json())
        assert len(resolved) == len(trials) > 3


def parameters(config: ConfigDict) -> int:
    """Of the model as it is built, from shapes alone. A byte tokenizer's vocabulary where the config leaves it open."""
    shapes = jax.eval_shape(build(config.model, 257).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("arg, mamba_arg", [(None, None), ("130m", "130m"), ("350m", "370m"), ("1.4b", "1.4b")])
def test_the_three_are_matched_in_parameters(arg, mamba_arg):
    dense = parameters(config_of("densemamba", arg))
    for other in (config_of("mamba", mamba_arg), config_of("transformer", arg)):
        assert abs(parameters(other) / dense - 1) < 0.02


# Kernels


def test_every_operation_has_its_field():
    assert set(config_of("mamba").model.implementation) == set(OPERATIONS)
    assert set(OPERATIONS) == {name for mixer in MIXERS.values() for name in mixer.operations}


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


def test_every_rule_is_about_a_field_that_some_config_has():
    configs = [config_of(name) for name in NAMES]
    for field in (*CHOICES, *RANGES, *POSITIVE, *SHARES):
        assert any(has_field(config, field) for config in configs), field


@pytest.mark.parametrize("field", sorted(CHOICES))
def test_choices_are_refused_by_name(field):
    config = next(config for config in map(config_of, NAMES) if has_field(config, field))
    set_field(config, field, "nonesuch")
    with pytest.raises(UserError) as error:
        validate(config)
    message = str(error.value)
    assert field in message and "'nonesuch'" in message and repr(CHOICES[field][-1]) in message
    assert "\n" not in message


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
        ("performer", "model.performer.heads", 3, "divisor of model.width=128"),
        ("linear_attention", "model.linear_attention.heads", 3, "divisor of model.width=128"),
        ("retnet", "model.retnet.heads", 3, "divisor of model.width=128"),
        ("retnet", "model.retnet.key_dim", 7, "even"),
        ("denseretnet", "model.dense.variant", "carry", "with a matrix state"),
        ("denseretnet", "model.dense.projection", "linear", "'identity' with a matrix state"),
        ("transformer", "model.dense.variant", "read", "'none' without one of mamba, mamba2, retnet"),
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


def test_blocks_of_a_pattern():
    assert blocks("mamba attention+mlp") == [("mamba",), ("attention", "mlp")]


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
