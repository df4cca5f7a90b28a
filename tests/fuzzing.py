"""Odd values for every field of a config and every flag of a command, and what must hold of each.

A value is either refused in one line that names the field, or it is in the resolved config, and the model, the
optimizer and the schedule can be built from it. tests/test_fuzz.py draws the values.
"""

import functools
import json
import math
import numbers
from typing import Any

import jax
import numpy as np
from hypothesis import strategies as st
from ml_collections import ConfigDict

from seqmodels import cli
from seqmodels.config import declared_fields, upgrade, validate
from seqmodels.configs import (
    deltanet,
    densemamba,
    gated_deltanet,
    gla,
    h3,
    hyena,
    linear_attention,
    mamba2,
    mamba3,
    performer,
    retnet,
    s5,
    synthetic,
    transformer,
)
from seqmodels.data.contract import BatchSource, text_spec
from seqmodels.fields import Field
from seqmodels.model import build_for
from seqmodels.pattern import parse
from seqmodels.training.optimizer import decay_mask, make_optimizer, make_schedule, rate_factors
from seqmodels.training.state import abstract_params

CONFIGS = {
    "deltanet": deltanet.get_config, "densemamba": densemamba.get_config, "gated_deltanet": gated_deltanet.get_config,
    "gla": gla.get_config, "linear_attention": linear_attention.get_config,
    "h3": h3.get_config, "hyena": hyena.get_config,
    "mamba2": mamba2.get_config, "mamba3": mamba3.get_config, "performer": performer.get_config,
    "retnet": retnet.get_config, "s5": s5.get_config, "synthetic": synthetic.get_config,
    "transformer": transformer.get_config,
}  # fmt: skip
MOST_BLOCKS = 24  # of models that are built: the time grows with them
SMALL = {"model.width": 32, "model.repeats": 2, "seq_len": 64, "batch_size": 4}

# What no field takes, or only few do: other types, ends of what numbers can be, and texts that are not clean.
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, -(2**31), -(2**63) - 1, 10**5000),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 0.999999999, 1e-5, 1e-40, 1e-320, 1e38, 1e39, 1e308, 3.0e38),
    *(math.nan, math.inf, -math.inf, 10**400),
)
TEXTS = (
    *("", " ", "abc", "None", "True", "1", "nan", "(1, 2)", "[", "{}", "'", '"', "a=b", "a,b", ",", "../x", "/", "~/x"),
    *("a\nb", "\x00", "caf\udce9", "日本語 🙂", "-1", "--x", "%s{0}", "x" * 5000, "1e400", "9" * 5000, "\u2028"),
    "~of nobody/x",
)
LISTS = (
    *((), (0,), (1,), (-1,), (1, 2), (1.5,), ("a",), ("1",), (None,), ((1, 2), 3), (True,), (math.nan,), (math.inf,)),
    *((2**31,), (2**63,), (10**30,), [], [1], [[1]], (1,) * 1000),
)
OTHERS = (None, True, False, {}, {"a": 1}, b"bytes", 1j, object, np.float32(0.5), np.int64(3), np.array([1]))


def values_of(field: Field) -> st.SearchStrategy:
    """Odd values for a field, and those near the ends of its range."""
    near: list[Any] = [field.default, *field.allowed.choices]
    near += [choice.upper() for choice in field.allowed.choices if isinstance(choice, str)]
    if isinstance(field.default, numbers.Real) and not isinstance(field.default, bool):
        near += [type(field.default)(field.default * by) for by in (2, -1)] + [field.default + 1, field.default - 1]
    return st.one_of(
        *(st.sampled_from(pool) for pool in (near, NUMBERS, TEXTS, LISTS, OTHERS)),
        st.integers(),
        st.floats(),
        st.text(max_size=20),
        st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=3)), max_size=4).map(tuple),
    )


@functools.cache
def config_of(name: str) -> ConfigDict:
    """A small config with every field."""
    config = upgrade(CONFIGS[name]())
    for field, value in SMALL.items():
        set_field(config, field, value)
    if name == "synthetic":
        config.seq_len = CONFIGS[name]().seq_len
    return config


def with_value(name: str, field: str, value: Any) -> ConfigDict:
    """The config with any value in a field, whatever its type."""
    plain = config_of(name).to_dict()
    *groups, last = field.split(".")
    inside = plain
    for part in groups:
        inside = inside[part]
    inside[last] = value
    return ConfigDict(plain, convert_dict=True)


def set_field(config: ConfigDict, field: str, value: Any) -> None:
    *groups, last = field.split(".")
    for part in groups:
        config = config[part]
    del config[last]
    config[last] = value


def fields_of(name: str) -> dict[str, Field]:
    """Every declared field of a config by its dotted name."""
    return declared_fields(config_of(name))


class Words(BatchSource):
    """The description of a text, without the text."""

    def __init__(self, config: ConfigDict) -> None:
        self.sizes = config.batch_size, config.seq_len

    @property
    def spec(self):
        return text_spec(*self.sizes, 257)


def check_accepted(config: ConfigDict) -> None:
    """Whether what training makes of an accepted config before it compiles can be made, with finite numbers."""
    config = upgrade(config)
    optimizer = config.optimizer
    schedule = make_schedule(optimizer, config.steps)
    for step in {0, config.steps // 2, config.steps - 1}:
        assert math.isfinite(rate := float(schedule(step))) and 0 <= rate <= optimizer.learning_rate * 1.001
    params = {"w": jax.numpy.ones(2), "zero": jax.numpy.zeros(2)}
    gradients = {"w": jax.numpy.full(2, 0.1), "zero": jax.numpy.zeros(2)}
    small = make_optimizer(optimizer)
    direction, _ = small.update(gradients, small.init(params), params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(direction)), direction
    if len(parse(config.model.pattern)) * config.model.repeats <= MOST_BLOCKS:
        boxed = _built(json.dumps(config.model.to_dict(), sort_keys=True), config)
        rate_factors(optimizer.groups, boxed)
        decay_mask(boxed)


BUILT: dict[str, Any] = {}


def _built(key: str, config: ConfigDict) -> Any:
    """The abstract parameters of a model; each model is built once."""
    if key not in BUILT:
        dataset = Words(config)
        model = build_for(config.model, dataset)
        BUILT[key] = abstract_params(model, config)
    return BUILT[key]


def shown_in(config: ConfigDict, field: str, value: Any) -> bool:
    """Whether a config holds a value as it was given."""
    found = dict(cli.fields(upgrade(config)))[field]
    if isinstance(found, numbers.Real) or isinstance(value, str):
        return (type(value) is not str and float(found) == float(value)) or found == value
    return list(found) == list(value)


__all__ = ["CONFIGS", "check_accepted", "config_of", "fields_of", "shown_in", "validate", "values_of", "with_value"]
