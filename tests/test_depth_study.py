"""The study of connections across depth: equal parameters in what is compared, and the plan as documented."""

import functools
import math
import re

import flax.linen as nn
import jax
import pytest

from seqmodels.configs import depth_study
from seqmodels.configs.depth_study import SWEEPS, minutes
from seqmodels.model import build
from seqmodels.sweeps.definition import resolve
from seqmodels.training.state import abstract_params
from tests.sweep_fakes import ROOT

TRAINED = ("steps", "optimizer.learning_rate")  # fields of a trial that no parameter depends on


def listing(stage, arg):
    """The trials of a stage."""
    trials = []
    SWEEPS[stage](lambda trial, against=None: trials.append(trial), arg)
    return trials


def compared(stage, arg):
    """(trial, what it is compared with) for each trial of a stage, without how they are trained."""
    pairs = {}

    def add(trial, against=None):
        fields = [tuple(sorted((k, v) for k, v in each.items() if k not in TRAINED)) for each in (trial, against)]
        pairs[tuple(fields)] = None

    SWEEPS[stage](add, arg)
    return list(pairs)


@functools.cache
def parameters(fields, arg):
    """Number of parameters, of shapes alone. A scan over blocks has as many, and is traced sooner."""
    config = resolve(depth_study.get_config(arg), dict(fields) | {"model.scan_blocks": 1}, "test")
    boxed = abstract_params(build(config.model, config.model.vocab_size), config)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nn.unbox(boxed)))


def plain(fields):
    """Whether these are the fields of a model without connections across depth."""
    return dict(fields).get("model.depth") == "none" and "model.dense.variant" not in dict(fields)


@pytest.mark.parametrize("stage, arg", [("rates", "25m"), ("rates", "130m"), ("mixers", "25m")])
def test_every_form_is_compared_with_as_many_parameters(stage, arg):
    pairs = compared(stage, arg)
    trials = {trial for trial, _ in pairs}
    assert all(plain(other) and other in trials for _, other in pairs)
    forms = [(trial, other) for trial, other in pairs if not plain(trial)]
    assert len(forms) == 12  # of Mamba, or three of each other mixer
    for trial, other in forms:
        assert abs(parameters(trial, arg) / parameters(other, arg) - 1) < 0.005, trial


def test_the_documented_minutes_are_planned():
    """Of each stage in the table of docs/depth.md, rounded up to five minutes."""
    table = (ROOT / "docs" / "depth.md").read_text().partition("## The study")[2]
    rows = re.findall(r"^\| `(\w+)`(?:, preset (\w+))? \| (\d+) x (\d+) \|.*\| (\d+) \|$", table, re.MULTILINE)
    assert [row[0] for row in rows] == list(SWEEPS)
    for stage, arg, trials, seeds, planned in rows:
        listed = {str(sorted(trial.items())) for trial in listing(stage, arg or "25m")}
        assert int(trials) == len(listed)
        assert int(planned) == 5 * math.ceil(minutes(stage, arg or "25m", int(seeds)) / 5)
