"""Speed and memory with a clock that ticks once a look, and bytes counted by hand."""

import itertools
import types

import jax
import jax.numpy as jnp
import pytest

from seqmodels.configs import densemamba, transformer
from seqmodels.errors import UserError
from seqmodels.evals import memory, report, throughput
from seqmodels.model import build
from seqmodels.training.sharding import unbox

pytestmark = pytest.mark.slow


def run_of(module):
    config = module.get_config().unlock()
    config.update(seq_len=4)
    config.model.update(width=16, repeats=1)
    config.model.dense.bottleneck = 8
    if "attention" in config.model:
        config.model.attention.heads, config.model.mlp.hidden = 2, 16
    config.evaluation.throughput.update(contexts=(3, 1), batches=(2,), tokens=5, repeats=2)
    model = build(config.model, 257)
    params = unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    dataset = types.SimpleNamespace(tokenizer=types.SimpleNamespace(vocab_size=257))
    return types.SimpleNamespace(config=config, model=model, params=params, dataset=dataset)


# Width 16: inner 32, 16 states a channel, 3 inputs for the convolution, float32; segment and position.
RECURRENT = 4 * (32 * 16 + 3 * 32 + 2)


def cache_bytes(slots):
    """Keys and values of width 16, the document of each slot, and how many are in use; segment and position."""
    return 4 * (2 * 16 * slots + slots + 1 + 2)


@pytest.mark.parametrize(
    "module, state",
    [(densemamba, {4: RECURRENT, 12: RECURRENT}), (transformer, {4: cache_bytes(16), 12: cache_bytes(32)})],
)
def test_figures(module, state, monkeypatch, tmp_path):
    run = run_of(module)
    ticks = itertools.count()
    monkeypatch.setattr(throughput, "time", types.SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    throughput.check(run.config)
    result = throughput.evaluate_run(run, [], None)
    assert list(result["throughput"]) == ["4", "12"]
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(run.params))
    for context, programs in ((4, 2), (12, 3)):  # 12 = 8 + 4, and the single tokens
        figures = result["throughput"][str(context)]["2"]
        assert figures["prefill_tokens_per_second"] == 2 * context
        assert figures["decode_tokens_per_second"] == 2 * 5
        assert figures["decode_ms"] == 200.0
        assert figures["compile_seconds"] == programs
        assert figures["state_bytes"] == 2 * state[context]
        assert weights + figures["state_bytes"] < figures["planned_bytes"] < 10 * weights
        assert figures["peak_bytes"] is None  # of a CPU
    table = throughput.table(result)
    assert "24" in table and f"{2 * state[12] / 1024:,.1f} KiB" in table
    assert report.plot(tmp_path / "eval.png", {"throughput": throughput}, result, "title")


def test_what_memory_does_not_allow_is_said(monkeypatch):
    run = run_of(densemamba)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 1000)
    result = throughput.evaluate_run(run, [], None)
    assert "GiB of memory" in result["throughput"]["4"]["2"]["not_served"]
    assert "GiB of memory" in throughput.table(result)


@pytest.mark.parametrize("field, value", [("contexts", ()), ("batches", (1, 0)), ("tokens", 0), ("repeats", -1)])
def test_sizes_that_make_no_sense(field, value):
    config = densemamba.get_config().unlock()
    config.evaluation.throughput[field] = value
    with pytest.raises(UserError, match=rf"config.evaluation.throughput.{field}=.*: must be at least 1"):
        throughput.check(config)
