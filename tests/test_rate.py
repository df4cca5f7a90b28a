"""The evaluator of other sampling rates: its filter, its rows, and a model for which a lower rate loses nothing."""

import types

import flax.linen as nn
import jax
import numpy as np
import pytest
from scipy import signal

from seqmodels.configs import s5, transformer
from seqmodels.errors import UserError
from seqmodels.evals import find, rate
from seqmodels.model import build_for
from tests.array_data import ArrayDataset

T = 24


def held(rng, count):
    """Noise whose samples come in pairs of equals; the label is the sign of the last."""
    values = np.repeat(rng.normal(size=(count, T // 2, 2)), 2, axis=1).astype(np.float32)
    return dict(values=values, mask=np.ones((count, T), bool), labels=(values[:, -1, 0] > 0).astype(np.int32))


def run_of(config, dataset):
    model = build_for(config.model, dataset)
    tokens = dataset.batch(0)["values"]
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens))["params"]
    return types.SimpleNamespace(config=config, model=model, params=params, dataset=dataset, batch_size=8, mesh=None)


def classifier(module, pattern):
    config = module.get_config().copy_and_resolve_references().unlock()
    config.update(seq_len=T, batch_size=8)
    config.model.update(pattern=pattern, width=16, repeats=2, input="frames", head="classify", pool="last")
    return config


def test_the_low_pass():
    """SciPy's window method; slow waves pass, fast ones do not, and a level stays one up to the ends."""
    values, impulse = np.random.default_rng(0).normal(size=(99, 2)), np.eye(99)[:, 49:50]
    for factor in (2, 3):
        taps = signal.firwin(16 * factor + 1, 1 / factor, window="hann")
        want = np.zeros(99)
        want[49 - 8 * factor : 50 + 8 * factor] = taps
        near = slice(16 * factor, 99 - 16 * factor)
        np.testing.assert_allclose(rate.low_pass(impulse, factor)[near, 0], want[near], atol=1e-6)
        np.testing.assert_allclose(rate.low_pass(np.ones((99, 1)), factor), 1, rtol=1e-6)
    middle, t = slice(35, 64), np.arange(99)[:, None]
    slow, fast = np.cos(0.2 * np.pi * t), np.cos(0.8 * np.pi * t)
    np.testing.assert_allclose(rate.low_pass(slow + fast, 2)[middle], slow[middle], atol=5e-3)
    assert rate.low_pass(values, 2).dtype == np.float32


def test_rows_at_a_lower_rate():
    """Every array of time is sampled; documents and padding do not reach the filter of another document."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(1, 12, 1)).astype(np.float32)
    ids, mask = np.array([[0] * 5 + [1] * 7]), np.arange(12)[None] < 11
    batch = dict(values=np.where(mask[..., None], values, np.nan), segment_ids=ids, mask=mask, labels=np.array([3]))
    split = types.SimpleNamespace(batches=lambda size, limit: [batch])
    (plain,) = rate.Sampled(split, 3).batches(1)
    (smooth,) = rate.Sampled(split, 3, filtered=True).batches(1)
    for name in ("segment_ids", "mask"):
        np.testing.assert_array_equal(plain[name], batch[name][:, ::3])
    np.testing.assert_array_equal(plain["values"], batch["values"][:, ::3])
    assert plain["labels"][0] == smooth["labels"][0] == 3
    (longer,) = rate.Sampled(split, 3, held=True).batches(1)
    np.testing.assert_array_equal(longer["values"][0, [0, 2, 3, 5, 9]], batch["values"][0, [0, 0, 3, 3, 9]])
    np.testing.assert_array_equal(longer["mask"], mask)
    alone = np.concatenate([rate.low_pass(values[0, :5], 3), rate.low_pass(values[0, 5:11], 3)])
    np.testing.assert_array_equal(smooth["values"][0], alone[::3])


def test_a_held_signal_loses_nothing():
    """S5 holds its input for a step: every second sample of pairs, at twice the distance, gives the same logits."""
    dataset = ArrayDataset("classify", held, 8, {"labels": 2}, rows=16)
    config = classifier(s5, "s5")
    config.model.repeats = 1  # what a second block reads is not held
    config.model.s5.update(dt_min=0.1, dt_max=1.0)  # steps that matter in so few samples
    run = run_of(config, dataset)
    run.params["block_0"]["mixer"]["C"] *= 10  # so that the states count beside the last sample
    result = rate.evaluate_run(run, ["test"], None)
    trained, ways = result["rate"]["test"][1]["as trained"], result["rate"]["test"][2]
    assert ways["sampled"]["loss"] == pytest.approx(trained["loss"], rel=1e-4)
    assert ways["held"] == trained  # these samples came in pairs before
    assert abs(ways["not rescaled"]["loss"] - trained["loss"]) > 0.01
    assert "filtered" in rate.table(result) and "accuracy" in rate.table(result)


def test_what_does_not_fit_is_named():
    dataset = ArrayDataset("classify", held, 8, {"labels": 2})
    config = classifier(transformer, "attention")
    assert rate.serves(types.SimpleNamespace(config=config, dataset=dataset)) and find(["rate"])
    with pytest.raises(
        UserError, match=r"--evals=rate: does not fit 'attention' in model.pattern, which does not foll"
    ):
        rate.check(config)
    config = classifier(s5, "bi:s5")
    config.model.update(input="patches", patch=4)
    config.evaluation.rates = (2, 4)
    with pytest.raises(UserError, match=r"config.evaluation.rates=4: must leave a number of samples that model.patch"):
        rate.check(config)
