"""Presets: every one is valid, as in its golden file, and of the size that it says."""

import importlib
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from seqmodels import pattern
from seqmodels.config import validate
from seqmodels.configs import mixcon
from seqmodels.model import build
from tests.golden.regenerate import HERE, ROOT, every_config
from tests.presets import NAMES, config_of

REGENERATE = "if the change is meant: python tests/golden/regenerate.py, and look through the diff"
CONFIGS = every_config()
GOLDEN = sorted(path.name for path in HERE.glob("*.json"))
LARGE = {  # a preset of a paper's size, where it is not 130m
    **{"deltanet": "340m", "denseretnet": "350m", "gated_deltanet": "340m", "gla": "340m", "retnet": "200m"},
    **dict.fromkeys(("cnn", "gru", "hgrn", "lstm", "mingru", "minlstm", "sparse_transformer"), "small"),
    **dict.fromkeys(("h3", "hyena", "s4", "s4d", "s5"), "small"),
    "bigbird": "base",
    **{"griffin": "2b", "rwkv": "169m"},
    **{"jamba": "tiny-dev", "mixcon": "5b-active", "mixtral": "8x7b"},
    **{"llama": "2-7b", "mistral": "7b-v0.1", "pythia": "70m", "samba": "421m"},
}
SAME_SIZE = ("cnn", "griffin", "gru", "h3", "hgrn", "hyena", "jamba", "llama", "lstm", "mingru", "minlstm", "mistral",
             "mixtral", "pythia", "rwkv", "s4", "s4d", "s5", "samba")  # fmt: skip
ABLATIONS = [name + experts for name in mixcon.LAYOUTS for experts in ("", "-moe")]


def test_every_preset_has_its_golden_file():
    """Of a config that has any: one that somebody just wrote needs none yet."""
    known = {name.split("-")[0] for name in GOLDEN}
    assert set(GOLDEN) == {name for name in CONFIGS if name.split("-")[0] in known}, REGENERATE


def test_docs_list_every_preset():
    table = dict(re.findall(r"^\| `(\w+)\.py` \| (.*?) \|", (ROOT / "docs" / "configs.md").read_text(), re.MULTILINE))
    listed = {f"{name}-{preset}.json" for name, presets in table.items() for preset in re.findall("`(.*?)`", presets)}
    assert listed == set(GOLDEN)


@pytest.mark.smoke
@pytest.mark.parametrize("name", GOLDEN)
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


@pytest.mark.parametrize("name", SAME_SIZE)
def test_small_presets_have_the_same_size(name):
    assert abs(parameters(config_of(name)) / parameters(config_of("densemamba")) - 1) < 0.02


@pytest.mark.parametrize(
    "name", [name if name == "2to6-moe" else pytest.param(name, marks=pytest.mark.slow) for name in ABLATIONS]
)
def test_ablations_of_mixcon_have_the_same_size(name):
    small, config = config_of("mixcon"), config_of("mixcon", name)
    assert parameters(config) == mixcon.parameters(config.model)  # the closed form that matches them
    assert abs(parameters(config) / parameters(small) - 1) < 0.02
    if name == "2to6-moe":
        assert config.model == small.model


@pytest.mark.slow
def test_switches_of_conba_are_compared_at_the_same_size():
    trials, same = [], parameters(config_of("mixcon", "only_conba"))
    mixcon.switches(trials.append, "only_conba")
    for trial in trials:
        config = config_of("mixcon", "only_conba")
        config.update_from_flattened_dict(trial)
        assert abs(parameters(config) / same - 1) < 0.005, trial


def test_layout_of_mixcon():
    """Figure 2 of the paper, from bottom to top, and the same in other words."""
    blocks = pattern.parse(config_of("mixcon").model.pattern)
    words = "conba+mlp conba+moe conba+mlp attention+moe attention+mlp conba+moe conba+mlp conba+moe"
    assert blocks == pattern.parse(words)
    assert config_of("mixcon", "1:7") == config_of("mixcon", "1to7")
    assert config_of("mixcon", "1:7").model.pattern == "(conba+mlp) x8 attention@4/8"
