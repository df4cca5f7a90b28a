"""The package from Python: trained models, configs, training, and mixers in other models."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqmodels as sq
from seqmodels.branches import BRANCHES
from seqmodels.errors import UserError
from seqmodels.evals.run import load_run
from seqmodels.generation import generate
from seqmodels.interop import pretrained
from seqmodels.mixers.alone import names
from seqmodels.sequence import make_sequence
from tests.run_fixtures import make_run, tiny, write_text


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run whose text is gone; its blocks are scanned."""
    folder = write_text(tmp_path_factory.mktemp("text"))
    made = make_run(tiny(folder, model__repeats=2, model__scan_blocks=1), folder / "run")
    (folder / "corpus.txt").unlink()
    return made


@pytest.fixture(scope="module")
def run(workdir):
    return sq.load(workdir)


def test_logits_and_hidden_states_are_those_of_the_model(run, workdir):
    loaded = load_run(workdir, text=False)
    tokens = jnp.asarray([[256, *b"all is well"]])
    hidden, _ = loaded.model.apply({"params": loaded.params}, tokens)
    logits = loaded.model.apply({"params": loaded.params}, hidden, method="logits")
    assert run.step == 4 and run.logits("all is well").shape == (12, 257)
    np.testing.assert_allclose(run.hidden("all is well"), hidden[0], atol=1e-6)
    np.testing.assert_allclose(run.logits("all is well"), logits[0, :, :257], atol=1e-5)
    np.testing.assert_array_equal(run.logits([256, *b"all is well"]), run.logits("all is well"))


def test_states_by_layer(run):
    states = run.states("all is well")
    assert list(states) == ["0.mixer", "1.mixer"]
    assert states["0.mixer"]["ssm"].shape == (1, 32, 16) and states["1.mixer"]["conv"].shape == (1, 3, 32)
    assert not np.array_equal(states["0.mixer"]["ssm"], states["1.mixer"]["ssm"])
    _, state = run.model.apply({"params": run.params}, jnp.asarray([[256, *b"all is well"]]))
    for layer in range(2):
        want = state["layers"]["blocks"]["block_0"]["mixer"]["ssm"][:, layer]
        np.testing.assert_allclose(states[f"{layer}.mixer"]["ssm"], want, atol=1e-6)


@pytest.mark.slow
def test_continuations(run):
    options = dict(tokens=6, seed=3)
    one = run.generate("all", **options)
    assert one == generate(run.model, run.params, run.tokenizer, "all", **options)
    several = run.generate(["all", "it is a"], num_samples=2, **options)
    assert [len(texts) for texts in several] == [2, 2] and several[0][0] == one and several[0][0] != several[0][1]
    assert [len(run.generate(["all", "it"], tokens=3)), len(run.generate("all", num_samples=2, tokens=3))] == [2, 2]
    greedy = run.generate(["all is", "it"], tokens=5, temperature=0)
    assert greedy == [run.generate(prompt, tokens=5, temperature=0) for prompt in ("all is", "it")]


def test_mistakes(run, tmp_path):
    for call, message in (
        (lambda: run.generate("x", num_samples=0), "num_samples=0: must be at least 1"),
        (lambda: run.generate("x", temperature=-1.0), "temperature=-1.0: must be at least 0"),
        (lambda: run.logits([300]), "token id 300: must be from 0 to 256"),
        (lambda: sq.load(tmp_path), "no config.json|is no run|holds no"),
        (lambda: sq.load("/nowhere"), "/nowhere"),
        (lambda: sq.from_pretrained(tmp_path), "has no config.json"),
        (lambda: sq.configs.mamba("big"), "no preset 'big'"),
        (lambda: sq.configs.mamba(stepps=3), r"config\.stepps=3: there is no such field; did you mean steps"),
        (lambda: sq.configs.mamba(steps=0), r"config\.steps=0: must be"),
    ):
        with pytest.raises((UserError, ValueError), match=message) as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(AttributeError, match="no config 'mambo'"):
        _ = sq.configs.mambo
    with pytest.raises(AttributeError, match="no mixer 'Mambo'; there are Attention"):
        _ = sq.mixers.Mambo
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = sq.lode


def test_weights_of_others(run, tmp_path):
    from seqmodels.interop.stacking import unstack

    pretrained.save(tmp_path / "hf", unstack(jax.device_get(run.params)), run.model.config)
    other = sq.from_pretrained(tmp_path / "hf")
    ids = [1, 2, 3, 4]
    np.testing.assert_allclose(other.logits(ids)[:, :257], run.logits(ids), atol=1e-5)
    with pytest.raises(UserError, match="there is no tokenizer"):
        other.generate("x")


@pytest.mark.slow
def test_training(tmp_path):
    text = write_text(tmp_path)
    fields = {"data.name": "text", "data.path": str(text), "data.cache": str(text / "cache"), "sample.tokens": 0}
    sizes = {"model.width": 16, "model.repeats": 1, "metrics.tensorboard": False}
    config = sq.configs.mamba("small", steps=2, batch_size=8, seq_len=16, **fields, **sizes)
    summary = sq.train(config, workdir=tmp_path / "run")
    assert summary["steps"] == 2 and len(sq.load(tmp_path / "run").generate("all", tokens=3)) <= 3


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = (
        "import sys, seqmodels as sq; sq.configs.mamba('130m', steps=3);assert not {'jax', 'flax'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Mixers in other models


def test_every_mixer_can_stand_alone():
    places = [BRANCHES.place(name) for name in BRANCHES]
    assert all(".channels." in module for module, member in places if member not in names())
    assert set(names()) <= set(dir(sq.mixers))


@pytest.mark.parametrize("name", ["Mamba", pytest.param("Attention", marks=pytest.mark.slow)])
def test_a_mixer_in_another_model(name):
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    mixer = getattr(sq.mixers, name)(width=16)
    variables = mixer.init(jax.random.key(1), x)
    whole, _ = mixer.apply(variables, x)

    branch = BRANCHES[names()[name]](width=16)
    seq = make_sequence(2, 9)[0]
    np.testing.assert_array_equal(whole, branch.apply(variables, x, seq)[0])

    state, pieces = mixer.init_state(2, 16), []
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        y, state = mixer.apply(variables, x[:, start:stop], state)
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, atol=1e-6)

    ids = jnp.asarray([[0] * 4 + [1] * 5] * 2)
    packed, _ = mixer.apply(variables, x, segment_ids=ids)
    alone, _ = mixer.apply(variables, x[:, 4:])
    np.testing.assert_allclose(packed[:, 4:], alone, atol=1e-6)
