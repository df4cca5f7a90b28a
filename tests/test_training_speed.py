"""Speed of training with a clock that ticks once a look."""

import itertools
import types

import jax
import numpy as np
import pytest
from flax import linen as nn

from seqmodels.configs import densemamba
from seqmodels.data.contract import text_spec
from seqmodels.errors import UserError
from seqmodels.evals import training_speed
from seqmodels.model import build
from seqmodels.training import sharding

pytestmark = pytest.mark.slow

ROWS, LENGTH = 2, 8


def batch(n):
    tokens = np.random.default_rng(n).integers(0, 257, (ROWS, LENGTH), dtype=np.int32)
    return dict(tokens=tokens, targets=np.roll(tokens, -1, 1), segment_ids=np.zeros_like(tokens))


@pytest.mark.slow
def test_figures(monkeypatch):
    config = densemamba.get_config().unlock()
    config.update(seq_len=LENGTH, batch_size=ROWS)
    config.model.update(width=32, repeats=1)
    config.mesh.data = 1
    read = []
    dataset = types.SimpleNamespace(batch=lambda n: read.append(n) or batch(n), spec=text_spec(ROWS, LENGTH, 257))
    mesh = sharding.make_mesh(config)
    run = types.SimpleNamespace(config=config, model=build(config.model, 257), dataset=dataset, mesh=mesh)
    ticks = itertools.count()
    monkeypatch.setattr(training_speed, "time", types.SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        result = training_speed.evaluate_run(run, [], None)
    figures = result["training"]
    # A look before and one after some steps: a second in all. The two steps that set the count take half of one each,
    # so a timing is of one step.
    assert figures["tokens_per_second"] == ROWS * LENGTH and figures["step_ms"] == 1000.0
    assert figures["compile_seconds"] == 1.0 and read == list(range(training_speed.BATCHES))
    parameters = densemamba.parameters(config.model)
    assert 3 * 4 * parameters < figures["planned_bytes"] < 40 * 4 * parameters  # weights and two moments at least
    assert figures["mfu"] is None and figures["peak_bytes"] is None  # of a CPU
    table = training_speed.table(result)
    assert f"{ROWS * LENGTH} tokens a second" in table and f"training on {mesh.size} x cpu" in table
    config.batch_size = 3
    config.training.accumulate = 2
    with pytest.raises(UserError, match="batch_size=3: must be a multiple of 2 "):
        training_speed.evaluate_run(run, [], None)
