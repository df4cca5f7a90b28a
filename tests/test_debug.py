"""training.debug: the first value that is not finite is found where it was put, in whatever form the model runs."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import cli
from seqmodels.branch import Branch
from seqmodels.branches import BRANCHES
from seqmodels.errors import UserError
from seqmodels.training import debug, loop, metrics
from seqmodels.training.state import init_state
from tests.run_fixtures import tiny, write_text

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "debugging.md").read_text()
FORMS = {
    "unrolled": dict(model__repeats=3),
    "scanned, rematerialised": dict(model__repeats=3, model__scan_blocks=1, model__remat="block"),
    "bptt, micro-batches": dict(model__repeats=3, training__bptt=True, training__accumulate=2),
}


class Kink(Branch):
    """Zeros, whose gradient is not a number: the root of zero."""

    def __call__(self, x, seq, state=None):
        return jnp.sqrt(jnp.square(x - jax.lax.stop_gradient(x))), {}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def trainer_and_state(text, **fields):
    trainer = loop.Trainer(tiny(text, **fields), text / "none", None, None)
    return trainer, init_state(trainer.model, trainer.optimizer, trainer.config, trainer.abstract)


def found(trainer, state):
    with trainer.on_mesh():
        return debug.first_not_finite(trainer.model, trainer.config, state, trainer.dataset.batch(0))


def with_block(params, block, name, value):
    """Parameters with those of one block's mixer called `name` set to a value."""
    stacked = "blocks" in params
    where = params["blocks"]["block_0"] if stacked else params[f"block_{block}"]
    leaf = where["mixer"][name]
    new = {**where, "mixer": {**where["mixer"], name: leaf.at[block if stacked else ...].set(value)}}
    return {**params, **({"blocks": {"block_0": new}} if stacked else {f"block_{block}": new})}


@pytest.mark.parametrize(
    "fields", [pytest.param(FORMS[name], id=name, marks=[pytest.mark.slow] * (name != "unrolled")) for name in FORMS]
)
def test_first_value_that_is_not_finite(text, fields):
    trainer, state = trainer_and_state(text, **fields)
    assert "everything is finite" in found(trainer, state)
    bad = state.replace(params=with_block(state.params, 1, "dt_bias", jnp.nan))
    assert found(trainer, bad) == "the first is in a parameter, block_1/mixer/dt_bias: 32 of 32 values are nan"
    large = with_block(with_block(state.params, 2, "x_proj", 1e38), 1, "x_proj", 1e38)
    assert re.fullmatch(
        r"the first is in the output of block_1/mixer\S* \(Mamba\): .*values are \w+",
        found(trainer, state.replace(params=large)),
    )


@pytest.mark.slow
def test_gradient_that_is_not_finite(text, monkeypatch):
    monkeypatch.setitem(BRANCHES, "kink", Kink)
    trainer, state = trainer_and_state(text, model__pattern="mamba kink mamba")
    assert "forward pass is finite" in (words := found(trainer, state))
    assert "the first is in the gradient of block_1/norm/scale: 16 of 16 values are nan" in words


def test_a_run_says_it_in_one_line_and_keeps_the_last_good_state(tmp_path, text):
    config = tiny(text, optimizer__learning_rate=1e30, optimizer__warmup=0.0, training__debug="nans")
    with pytest.raises(
        UserError, match=r"^\w+ is (nan|inf) at step 2; the first is in the output of \S+ \(\w+\)"
    ) as error:
        loop.train(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert (tmp_path / "run" / "checkpoints" / "1").exists()


def test_nans_needs_a_run_that_stops(tmp_path, text):
    config = tiny(text, training__debug="nans", training__nan="skip")
    with pytest.raises(UserError, match=r"training\.debug='nans': needs config\.training\.nan='stop', not 'skip'"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_table_of_shapes(tmp_path, text, capsys):
    fields = dict(training__debug="shapes", training__loss_chunk=8, model__scan_blocks=1)
    loop.train(tiny(text, steps=1, **fields), tmp_path / "run")
    said = capsys.readouterr().out
    rows = {
        line.split()[0]: line.split("  ")
        for line in said.splitlines()
        if line.startswith(("blocks/", "final_", "model.unembedding"))
    }
    for call, kind in (
        ("blocks/block_0/norm", "RMSNorm"),
        ("blocks/block_0/mixer", "Mamba"),
        ("final_norm", "RMSNorm"),
    ):
        assert kind in [cell.strip() for cell in rows[call]] and rows[call][-1].strip().startswith("4x16x16 float32")
    before, logits = [cell.strip() for cell in rows["model.unembedding"] if "float32" in cell]
    assert (before, logits) == ("4x8x16 float32", "4x8x264 float32")  # of half a row at a time
    assert said.index("call ") < said.index("compiled in")


@pytest.mark.slow
def test_without_jit_the_losses_are_the_same(tmp_path, text, capsys):
    fields = dict(steps=2, batch_size=2)  # the shapes of the same command in tests/test_commands.py: compiled once
    loop.train(tiny(text, **fields), tmp_path / "compiled")
    assert "compiled in" in capsys.readouterr().out
    loop.train(tiny(text, **fields, training__debug="nojit"), tmp_path / "not")
    assert "compiled in" not in capsys.readouterr().out
    losses = [
        [row["loss"] for row in metrics.read(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("compiled", "not")
    ]
    assert len(losses[0]) == 2
    np.testing.assert_allclose(*losses, rtol=1e-5)


# The page, whose commands run in tests/test_commands.py


@pytest.mark.slow
def test_every_script_of_the_page_runs(tmp_path, text, monkeypatch, capfd):
    """The model that is planned is a tiny one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "load_config", lambda name: tiny(text))
    loop.train(tiny(text, steps=1), tmp_path / "runs" / "tiny")
    scripts = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for script, words in zip(scripts, ("['__call__'][0] (1, 32, 16)", "temp"), strict=True):
        capfd.readouterr()
        exec(compile(script, "the page", "exec"), {})
        assert words in capfd.readouterr().out
