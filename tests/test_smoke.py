"""What must work before anything else is worth a test: imports, configs, three steps, one token, a resumed run.

In two minutes on two cores. It needs what requirements.txt names and pytest: .ci/run ends with it on the newest JAX.
"""

import importlib
import pkgutil
import types

import jax
import numpy as np
import pytest

import seqmodels
from seqmodels import cli, pattern
from seqmodels.config import validate
from seqmodels.data.contract import ArraySpec
from seqmodels.model import build, build_for
from seqmodels.training import loop, metrics
from seqmodels.training.optimizer import make_optimizer, make_schedule
from seqmodels.training.sharding import make_mesh
from seqmodels.training.state import abstract_params, abstract_state, init_state
from seqmodels.training.step import make_train_step
from tests.golden.regenerate import every_config
from tests.run_fixtures import tiny, write_text

pytestmark = pytest.mark.smoke

OPTIONAL = {"lm_eval", "datasets", "submitit", "torch", "transformers"}  # asked for by name where they are missing
PRESETS = [name.removesuffix(".json").replace("-", ":", 1) for name in every_config()]
ELSEWHERE = ("synthetic", "domains", "lra", "depth_study")  # their models are those of other configs
MODELS = [name for name in cli.builtin_configs() if name not in ELSEWHERE]


def modules(package):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        yield module.name


@pytest.mark.parametrize("name", sorted(modules(seqmodels)))
def test_every_module_imports(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"needs {error.name}")


@pytest.mark.parametrize("spec", PRESETS)
def test_every_preset_is_valid_and_builds(spec):
    config = cli.load_config(spec)
    validate(config)
    model = build_for(config.model, rows_for(config.model))
    assert config.model.input != "tokens" or model.config.vocab_size >= 257


def rows_for(model):
    """A dataset for any model, with rows of one step."""
    floats, ids, real = np.dtype(np.float32), np.dtype(np.int32), np.dtype(bool)
    read = dict(mask=ArraySpec((1, model.patch), real), segment_ids=ArraySpec((1, model.patch), ids))
    if model.input == "tokens":
        read["tokens"] = ArraySpec((1, 1), ids, 257)
    else:
        read["values"] = ArraySpec((1, model.patch, 1), floats)
    predicted = {
        "next_token": dict(targets=ArraySpec((1, 1), ids, 257)),
        "window": dict(targets=ArraySpec((1, model.horizon, 1), floats)),
        "rebuild": dict(targets=ArraySpec((1, 1), ids, 257)),
        "regress_steps": dict(targets=ArraySpec((1, 1, 1), floats)),
    }
    spec = read | predicted.get(model.head, dict(labels=ArraySpec((1,), ids, 10)))
    return types.SimpleNamespace(spec=spec, objective=model.head)


def one_of_each(text):
    """A pattern with each kind of block once."""
    blocks = dict.fromkeys(pattern.parse(text))
    return " ".join("+".join("|".join(step) for step in block) for block in blocks)


@pytest.mark.parametrize("name", MODELS)
def test_three_steps_and_one_token(name):
    config = cli.load_config(name)
    config.update(batch_size=2, seq_len=16, steps=3)
    config.model.update(repeats=1, pattern=one_of_each(config.model.pattern))
    config.mesh.data = 1
    config.optimizer.update(schedule="constant", warmup=0.0)
    model = build(config.model, 257)
    optimizer = make_optimizer(config.optimizer, abstract_params(model, config))
    mesh = make_mesh(config)
    state = init_state(model, optimizer, config, abstract_state(model, optimizer, config, mesh))
    step = jax.jit(make_train_step(model, optimizer, make_schedule(config.optimizer, 3), config))
    rows = np.random.default_rng(0).integers(0, 257, (2, 17)).astype(np.int32)
    batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "segment_ids": np.zeros((2, 16), np.int32)}
    losses = []
    for _ in range(3):
        state, figures = step(state, batch)
        losses.append(float(figures["loss"]))
    assert 4 < losses[0] < 8 and losses[0] > losses[1] > losses[2]  # the same rows each time; at random 5.5 nats

    params = {"params": state.params}
    apply = jax.jit(lambda tokens, state: model.apply(params, tokens, state=state))
    whole, _ = apply(rows[:, :5], None)
    _, before = apply(rows[:, :4], model.init_state(2, 16))
    last, _ = apply(rows[:, 4:5], before)
    np.testing.assert_allclose(last[:, 0], whole[:, -1], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def test_a_run_is_resumed(tmp_path, text):
    def losses(workdir, *steps):
        for each in steps:
            same_at_every_step = dict(optimizer__schedule="constant", optimizer__warmup=0.0)
            loop.train(tiny(text, steps=each, sample__tokens=2, **same_at_every_step), workdir)
        return [row["loss"] for row in metrics.read(workdir / "metrics.jsonl") if "loss" in row]

    assert losses(tmp_path / "broken", 2, 4) == losses(tmp_path / "whole", 4)
