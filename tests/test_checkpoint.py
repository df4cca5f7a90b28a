"""Checkpoints: round trips, other meshes, retention, and every way a directory can be damaged."""

import gc
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import UserError
from seqmodels.training import checkpoint, sharding
from seqmodels.training.optimizer import make_optimizer
from seqmodels.training.state import abstract_params, abstract_state, init_state
from tests.training_model import LeakyModel, small_config

# Where one array of a checkpoint cannot be read, Orbax leaves the coroutines for the others behind. Python reports
# them when it collects them, which the fixture makes happen before the test ends.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collect_coroutines():
    yield
    gc.collect()


def state_of(config):
    """(abstract, state) with values that are not the initial ones."""
    model = LeakyModel()
    mesh = sharding.make_mesh(config)
    optimizer = make_optimizer(config.optimizer, abstract_params(model, config))
    abstract = abstract_state(model, optimizer, config, mesh)
    state = init_state(model, optimizer, config, abstract)

    def perturbed(x):
        noise = np.random.default_rng(x.size).normal(size=x.shape)
        return jax.device_put((np.asarray(x) + noise).astype(x.dtype), x.sharding)

    return abstract, jax.tree.map(perturbed, state)


def checkpoints_of(tmp_path, config):
    return checkpoint.Checkpoints(tmp_path / "checkpoints", config.checkpoint)


def save(store, state, *steps, metrics=None):
    for step in steps:
        store.save(step, state.replace(step=jax.device_put(jnp.int32(step), state.step.sharding)), metrics)
    store.close()


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        assert x.dtype == y.dtype


FULL = dict(training__bptt=True, optimizer__ema=0.9)


def test_no_checkpoint_is_none(tmp_path):
    config = small_config()
    assert checkpoints_of(tmp_path, config).restore(state_of(config)[0]) is None


@pytest.mark.parametrize("mesh", [dict(data=1), dict(data=2, fsdp=2, tensor=2), dict(data=1, tensor=8)])
def test_restores_bit_for_bit_onto_another_mesh(tmp_path, mesh):
    config = small_config(mesh__data=4, mesh__fsdp=2, **FULL)
    abstract, state = state_of(config)
    save(checkpoints_of(tmp_path, config), state, 7)
    config = small_config(**FULL, **{f"mesh__{axis}": size for axis, size in mesh.items()})
    abstract, _ = state_of(config)
    back = checkpoints_of(tmp_path, config).restore(abstract)
    assert int(back.step) == 7
    assert_equal(back.replace(step=state.step), state)
    assert jax.tree.map(lambda x: x.sharding, back) == jax.tree.map(lambda x: x.sharding, abstract)


def test_parameters_alone_and_their_average(tmp_path):
    config = small_config(**FULL)
    abstract, state = state_of(config)
    save(checkpoints_of(tmp_path, config), state, 3, 5)
    step, params = checkpoint.restore_params(tmp_path / "checkpoints", abstract.params)
    assert step == 5
    assert_equal(params, state.params)
    step, ema = checkpoint.restore_params(tmp_path / "checkpoints", abstract.params, step=3, ema=True)
    assert step == 3
    assert_equal(ema, state.ema)
    with pytest.raises(UserError, match=r"no checkpoint of step 4 .* there are \[3, 5\]"):
        checkpoint.restore_params(tmp_path / "checkpoints", abstract.params, step=4)
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.restore_params(tmp_path / "nothing", abstract.params)


def test_retention(tmp_path):
    config = small_config(checkpoint__keep=2, checkpoint__keep_every=4, checkpoint__best="validation_loss")
    _, state = state_of(config)
    store = checkpoints_of(tmp_path, config)
    for step in range(1, 11):
        metrics = {"validation_loss": abs(step - 3.0)} if step % 3 == 0 else None
        store.save(step, state, metrics)
    store.close()
    assert checkpoint.steps(tmp_path / "checkpoints") == [10, 9, 8, 4, 3]


def test_due():
    config = small_config(checkpoint__every=4, checkpoint__keep_every=6).checkpoint
    assert [n for n in range(1, 15) if checkpoint.due(config, n, 13)] == [4, 6, 8, 12, 13]


def test_saving_a_step_again_keeps_the_first(tmp_path):
    config = small_config()
    abstract, state = state_of(config)
    save(checkpoints_of(tmp_path, config), state, 2)
    save(checkpoints_of(tmp_path, config), jax.tree.map(jnp.zeros_like, state), 2)
    assert_equal(checkpoints_of(tmp_path, config).restore(abstract).params, state.params)


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


DAMAGE = {
    "data flipped": lambda folder: flip(largest_file(folder / "params")),
    "data cut short": lambda folder: os.truncate(largest_file(folder / "params"), 10),
    "data empty": lambda folder: os.truncate(largest_file(folder / "rest"), 0),
    "data gone": lambda folder: largest_file(folder / "rest").unlink(),
    "manifest gone": lambda folder: (folder / "params" / "manifest.ocdbt").unlink(),
    "tree metadata garbled": lambda folder: (folder / "params" / "_METADATA").write_text("{"),
    "all files empty": lambda folder: [os.truncate(p, 0) for p in folder.rglob("*") if p.is_file()],
    "no files": lambda folder: [p.unlink() for p in folder.rglob("*") if p.is_file()],
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_falls_back_and_says_so(tmp_path, capsys, how):
    config = small_config()
    abstract, state = state_of(config)
    folder = tmp_path / "checkpoints"
    save(checkpoints_of(tmp_path, config), state, 2, 4)
    DAMAGE[how](folder / "4")
    store = checkpoints_of(tmp_path, config)
    back = store.restore(abstract)
    said = capsys.readouterr().err
    assert int(back.step) == 2 and "checkpoint 4 is damaged" in said and "falling back to checkpoint 2" in said
    assert_equal(back.params, state.params)
    assert (tmp_path / "checkpoints-damaged" / "4").is_dir()  # nothing is thrown away
    save(store, back, 4)  # and the run can save that step again
    assert int(checkpoints_of(tmp_path, config).restore(abstract).step) == 4


def test_damage_to_what_is_not_needed_loses_nothing(tmp_path):
    config = small_config()
    abstract, state = state_of(config)
    save(checkpoints_of(tmp_path, config), state, 2)
    (tmp_path / "checkpoints" / "2" / "_CHECKPOINT_METADATA").write_text("{")
    store = checkpoints_of(tmp_path, config)
    save(store, store.restore(abstract), 4)
    assert checkpoint.steps(tmp_path / "checkpoints") == [4, 2]


def test_older_damage_does_not_stop_saving(tmp_path):
    config = small_config()
    abstract, state = state_of(config)
    save(checkpoints_of(tmp_path, config), state, 2, 4)
    DAMAGE["all files empty"](tmp_path / "checkpoints" / "2")
    store = checkpoints_of(tmp_path, config)
    save(store, store.restore(abstract), 6)
    assert int(checkpoints_of(tmp_path, config).restore(abstract).step) == 6


def test_a_flip_that_only_the_fingerprint_sees(tmp_path, monkeypatch):
    """Read back as other bits: as from a disk whose own checks pass."""
    config = small_config()
    abstract, state = state_of(config)
    save(checkpoints_of(tmp_path, config), state, 2)
    load = checkpoint.ocp.load_checkpointables

    def flipped(*args):
        items = load(*args)
        if "params" in items:
            kernel = np.array(items["params"]["arrays"]["kernel"])
            kernel.view(np.uint32)[3, 5] ^= 1
            items["params"]["arrays"]["kernel"] = jax.device_put(kernel)
        return items

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", flipped)
    with pytest.raises(checkpoint.DamagedError, match="the bits of params are not those that were saved"):
        checkpoint._load(tmp_path / "checkpoints" / "2", "params", abstract.params)


def test_nothing_readable_is_an_error_and_loses_nothing(tmp_path):
    config = small_config()
    abstract, state = state_of(config)
    save(checkpoints_of(tmp_path, config), state, 2, 4)
    for step in "24":
        DAMAGE["data gone"](tmp_path / "checkpoints" / step)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        checkpoints_of(tmp_path, config).restore(abstract)
    assert checkpoint.steps(tmp_path / "checkpoints") == [4, 2]


def test_killed_while_saving_leaves_the_one_before(tmp_path):
    code = f"""
        import os, signal, jax, jax.numpy as jnp
        from ml_collections import ConfigDict
        from seqmodels.training.checkpoint import Checkpoints
        from seqmodels.training.state import TrainState
        config = ConfigDict(dict(every=1, keep=2, keep_every=0, best=""))
        store = Checkpoints({str(tmp_path / "checkpoints")!r}, config)
        state = lambda step, size: TrainState(jnp.int32(step), jnp.int32(0), {{"w": jnp.ones(size)}}, (), None, None)
        store.save(1, state(1, (8, 8)))
        store.close()
        store.save(2, state(2, (4000, 4000)))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert process.returncode == -9
    assert checkpoint.steps(tmp_path / "checkpoints") == [1]


def test_donating_the_saved_state_does_not_change_the_checkpoint(tmp_path):
    """The save runs on while the next step writes over the buffers it was given."""
    config = small_config()
    abstract, state = state_of(config)
    wanted = jax.tree.map(np.array, state)
    store = checkpoints_of(tmp_path, config)
    store.save(1, state)
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    state = jax.block_until_ready(overwrite(state))
    store.close()
    assert_equal(checkpoints_of(tmp_path, config).restore(abstract), wanted)


@pytest.mark.parametrize("name", ["a[1]b", "back\\slash", "a b=c,d%20?#*{x}'\"$\nline", "日 ü"])
def test_directories_of_any_name(tmp_path, name):
    config = small_config()
    abstract, state = state_of(config)
    (tmp_path / name).mkdir()
    save(checkpoints_of(tmp_path / name, config), state, 3)
    assert_equal(checkpoints_of(tmp_path / name, config).restore(abstract).params, state.params)
    assert_equal(checkpoint.restore_params(tmp_path / name / "checkpoints", abstract.params)[1], state.params)
