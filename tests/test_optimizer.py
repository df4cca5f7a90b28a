"""Schedules against their closed forms, AdamW against a plain float64 one, and the parameter groups."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from seqmodels.training.optimizer import decay_mask, make_optimizer, make_schedule
from seqmodels.training.state import abstract_params
from tests.training_model import LeakyModel, small_config


def schedule_of(steps, **overrides):
    config = small_config(**{f"optimizer__{name}": value for name, value in overrides.items()})
    schedule = make_schedule(config.optimizer, steps)
    return [float(schedule(t)) for t in range(steps)]


def test_cosine_with_warmup_as_a_share():
    rates = schedule_of(100, schedule="cosine", learning_rate=2.0, warmup=0.1, floor=0.25)
    for t, rate in enumerate(rates):
        wanted = 2.0 * (t + 1) / 10 if t < 10 else 2.0 * (0.25 + 0.75 * (1 + math.cos(math.pi * (t - 10) / 89)) / 2)
        assert rate == pytest.approx(wanted, rel=1e-5)
    assert rates[9] == rates[10] == 2.0 and rates[-1] == pytest.approx(0.5)


def test_wsd_holds_then_falls_linearly():
    rates = schedule_of(50, schedule="wsd", learning_rate=1.0, warmup=5.0, decay=0.2, floor=0.0)
    np.testing.assert_allclose(rates[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rates[5:40], 1.0)
    np.testing.assert_allclose(rates[39:], np.linspace(1, 0, 11), atol=1e-6)


def test_constant_and_no_warmup():
    assert schedule_of(4, schedule="constant", learning_rate=0.5, warmup=0.0) == [0.5] * 4


def test_one_step_has_a_finite_rate():
    assert all(
        math.isfinite(r) and r > 0 for name in ("cosine", "wsd", "constant") for r in schedule_of(1, schedule=name)
    )


def adamw64(params, grads, steps, config, decay):
    """AdamW with bias correction and global clipping, as in Loshchilov and Hutter (2019), algorithm 2."""
    m = {k: np.zeros_like(p) for k, p in params.items()}
    v = {k: np.zeros_like(p) for k, p in params.items()}
    for t in range(1, steps + 1):
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        factor = min(1.0, config.clip / norm)
        for k, p in params.items():
            g = grads[k] * factor
            m[k] = config.b1 * m[k] + (1 - config.b1) * g
            v[k] = config.b2 * v[k] + (1 - config.b2) * g**2
            step = m[k] / (1 - config.b1**t) / (np.sqrt(v[k] / (1 - config.b2**t)) + config.eps)
            params[k] = p - config.learning_rate * (step + config.weight_decay * decay[k] * p)
    return params


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_adamw_equals_a_float64_one(clip):
    config = small_config(optimizer__clip=clip).optimizer
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 4)), "scale": rng.normal(size=4), "A_log": rng.normal(size=(4, 2))}
    grads = {name: rng.normal(size=p.shape) for name, p in params.items()}
    now = {name: jnp.asarray(p, jnp.float32) for name, p in params.items()}
    optimizer = make_optimizer(config, decay_mask(now))
    state = optimizer.init(now)
    for _ in range(5):
        direction, state = optimizer.update({k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}, state, now)
        now = jax.tree.map(lambda p, d: p - config.learning_rate * d, now, direction)
    wanted = adamw64(params, grads, 5, config, {"kernel": 1.0, "scale": 0.0, "A_log": 0.0})
    for name in now:
        np.testing.assert_allclose(now[name], wanted[name], rtol=2e-5, atol=2e-6)


def test_groups_by_name_and_rank():
    boxed = lambda *axes: nn.LogicallyPartitioned(jnp.zeros((2,) * len(axes)), axes)  # noqa: E731
    mask = decay_mask(
        {
            "in": {"kernel": boxed("embed", "inner")},
            "norm": {"scale": boxed("embed")},
            "stacked": {"bias": boxed("layers", "inner"), "kernel": boxed("layers", "embed", "inner")},
            "mixer": {"A_log": boxed("inner", "state"), "D": boxed("layers", "inner"), "dt_bias": boxed("inner")},
        }
    )
    assert mask == {
        "in": {"kernel": True},
        "norm": {"scale": False},
        "stacked": {"bias": False, "kernel": True},
        "mixer": {"A_log": False, "D": False, "dt_bias": False},
    }


def test_groups_of_a_model():
    assert decay_mask(abstract_params(LeakyModel(), small_config())) == {
        "table": True, "kernel": True, "out": True, "scale": False,
    }  # fmt: skip
