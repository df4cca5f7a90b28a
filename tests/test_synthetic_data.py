"""Batches, splits and loss of synthetic tasks, and their configs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import cli, data
from seqmodels.config import validate
from seqmodels.configs import synthetic
from seqmodels.data.synthetic import GOES_ON, TASKS, make_task
from seqmodels.data.synthetic.dataset import FOLDS, fold
from seqmodels.errors import UserError
from seqmodels.heads.next_token import next_token_loss
from seqmodels.model import build, build_for


def load(name="induction", length=16, batch_size=8, seed=0, bptt=False, **changes):
    config = synthetic.get_config(name).data.unlock()
    task = changes.pop("task", {})
    config.update(changes)
    config.task.update(task)
    return data.load(config, seq_len=length, batch_size=batch_size, seed=seed, bptt=bptt)


# Batches


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_batch_is_a_function_of_seed_and_step(name):
    length = synthetic.SIZES[name]["length"]
    one, two = load(name, length), load(name, length)
    two.batch(3)  # what was asked before does not matter
    for n in (0, 7):
        a, b = one.batch(n), two.batch(n)
        assert sorted(a) == ["segment_ids", "targets", "tokens"]
        for key, part in a.items():
            assert part.shape == (8, length) and part.dtype == np.int32 and part.flags.c_contiguous
            np.testing.assert_array_equal(part, b[key])
            np.testing.assert_array_equal(part[2:5], one.batch(n, slice(2, 5))[key])
    others = [load(name, length, seed=1).batch(0)["tokens"], one.batch(1)["tokens"]]
    assert all((one.batch(0)["tokens"] != other).any() for other in others)
    assert not a["segment_ids"].any()


def test_held_out_rows_are_never_trained_on():
    """The 216 words of three elements of S3: each belongs to one side, whoever asks."""
    dataset = load("word_problem", 3, batch_size=64, task=dict(shortest=3), rows=300)
    trained = {tuple(row) for n in range(60) for row in dataset.batch(n)["tokens"].tolist()}
    held_out = {
        split: {tuple(b["tokens"][0].tolist()) for b in dataset[split].windows(3)} for split in ("validation", "test")
    }
    both = held_out["validation"] | held_out["test"]
    assert not trained & both
    assert len(trained) + len(both) == 6**3  # and nothing is lost
    assert 0.5 / FOLDS < len(both) / 6**3 < 2 / FOLDS


def test_folds_have_equal_shares():
    rows = np.random.default_rng(0).integers(0, 50, (16_000, 9))
    shares = np.bincount(fold(rows), minlength=FOLDS) / len(rows)
    assert abs(shares - 1 / FOLDS).max() < 5 * np.sqrt(1 / FOLDS / len(rows))
    changed = rows.copy()
    changed[:, 4] += 1
    assert abs((fold(changed) == fold(rows)).mean() - 1 / FOLDS) < 0.02


def test_too_few_rows_to_hold_some_out():
    with pytest.raises(UserError, match=r"config.seq_len=2: this task has too few different rows"):
        dataset = load("parity", 2, task=dict(shortest=1))  # two rows
        for split in ("train", "test"):
            next(dataset[split].windows(2))


def test_windows_are_the_rows_whatever_the_batch():
    split = load("parity", 12)["validation"]
    split = dataclasses.replace(split, count=7)
    one = [{key: part[0] for key, part in batch.items()} for batch in split.windows(12)]
    many = list(split.windows(12, batch_size=3))
    assert len(one) == 7 and len(many) == 3
    for i, row in enumerate(one):
        for key, part in row.items():
            np.testing.assert_array_equal(part, many[i // 3][key][i % 3])
    assert not many[2]["mask"][1:].any() and (many[2]["targets"][1:] == -1).all()
    assert len(list(split.windows(12, batch_size=2, limit=3))) == 2
    for batch in many:
        np.testing.assert_array_equal(batch["mask"], batch["targets"] >= 0)


def test_splits_differ_and_other_lengths_need_no_holding_out():
    dataset = load("parity", 12)
    validation, test = (next(dataset[name].windows(12, 8))["tokens"] for name in ("validation", "test"))
    assert (validation != test).any()
    longer = next(dataset["test"].windows(40, 400))["tokens"]
    assert len(np.unique(fold(longer))) == FOLDS
    with pytest.raises(UserError, match="split 'tset': must be one of train, validation, test"):
        dataset["tset"]


@pytest.mark.parametrize("name", GOES_ON)
def test_loss_of_all_positions(name):
    length = synthetic.SIZES[name]["length"]
    answers, everything = load(name, length).batch(0), load(name, length, loss="all").batch(0)
    np.testing.assert_array_equal(answers["tokens"], everything["tokens"])
    assert (everything["targets"] >= 0).all()
    counted = answers["targets"] >= 0
    np.testing.assert_array_equal(answers["targets"][counted], everything["targets"][counted])
    assert 0 < counted.mean() < 0.5
    held_out = next(load(name, length, loss="all")["test"].windows(length))
    assert 0 < held_out["mask"].mean() < 0.5  # evaluation is always of the answers


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(loss="every"), "config.data.loss='every': must be one of 'answers', 'all'"),
        (dict(name="parity", length=12, loss="all"), "config.data.loss='all': must be 'answers' with parity"),
        (dict(rows=0), "config.data.rows=0: must be at least 1"),
        (dict(lengths=(16, 0)), r"config.data.lengths=\(16, 0\)"),
        (dict(bptt=True), "config.training.bptt=True: must be False"),
        (dict(length=3), "config.seq_len=3: must be at least 4"),
        (dict(task=dict(vocab=2)), "config.data.task.vocab=2"),
    ],
)
def test_bad_fields_are_refused(changes, message):
    with pytest.raises(UserError, match=message) as error:
        load(**changes)
    assert "\n" not in str(error.value)


def test_tests_of_a_task():
    mqar = make_task("mqar", dict(synthetic.FIELDS["mqar"]))
    assert {name: (task.shapes, length) for name, (task, length) in mqar.tests((1, 2)).items()} == {
        "16x2": (((16, 2, 1.0),), 16),
        "32x4": (((32, 4, 1.0),), 32),
        "64x8": (((64, 8, 1.0),), 64),
    }
    parity = make_task("parity", dict(shortest=3))
    ((task, length),) = parity.tests((100,)).values()
    assert length == 100 and task.rows(np.random.default_rng(0), 3, 100).answers[:, -1].all()


def test_symbols_are_a_tokenizer():
    tokenizer = load("passkey", 64).tokenizer
    text = "the pass key is 1 2"
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.decode([tokenizer.vocab_size]) == ""
    with pytest.raises(UserError, match="'grasss' is no symbol of this task; there are grass"):
        tokenizer.encode("the grasss")


# Loss


def test_targets_of_minus_one_do_not_count():
    """Value and gradients are those of the counted positions alone, in float64, in chunks or whole."""
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(2, 7, 3)), rng.normal(size=(3, 5))
    targets = rng.integers(0, 5, (2, 7))
    counted = rng.random((2, 7)) < 0.4
    masked = np.where(counted, targets, -1)

    def reference(hidden, table):
        log_p = jax.nn.log_softmax(hidden @ table)
        return -jnp.where(counted, jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0], 0).sum()

    with jax.enable_x64(True):
        expected, wanted = jax.value_and_grad(reference, (0, 1))(jnp.asarray(hidden), jnp.asarray(table))
    for chunk in (0, 3):

        def loss(hidden, table, chunk=chunk):
            return next_token_loss(lambda h: h @ table, hidden, jnp.asarray(masked, jnp.int32), chunk=chunk)

        (value, sums), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            jnp.asarray(hidden, jnp.float32), jnp.asarray(table, jnp.float32)
        )
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert float(sums.count) == counted.sum()
        for mine, theirs in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
        assert not np.asarray(gradients[0])[~counted].any()


# Configs


@pytest.mark.parametrize("name", [*synthetic.FIELDS, *synthetic.PAPERS])
def test_every_preset_makes_batches(name):
    config = synthetic.get_config(name)
    validate(config)
    dataset = data.load(config.data, seq_len=config.seq_len, batch_size=2, seed=0)
    fields = [field.name for field in dataclasses.fields(dataset.task)]
    assert sorted(fields) == sorted(config.data.task) and config.name == f"synthetic-{name}-mamba"
    assert dataset.batch(0)["tokens"].shape == (2, config.seq_len)
    for task, length in dataset.task.tests(dataset.lengths).values():
        task.check(length)
    build_for(config.model, dataset)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", synthetic.mixers())
def test_every_config_is_a_mixer(mixer):
    config = synthetic.get_config(f"mqar,mixer={mixer},width=32,layers=2")
    validate(config)
    build(config.model, 64)
    assert config.model.width == 32 and config.name == f"synthetic-mqar-{mixer}"


def test_keys_of_the_argument():
    config = synthetic.get_config("modular_arithmetic,brackets=True,length=30,operators=+-,mixer=transformer,layers=3")
    assert config.seq_len == 30 and config.data.task.brackets and config.data.task.operators == "+-"
    assert config.model.repeats == 3 and config.model.pattern == "attention+mlp"
    assert synthetic.get_config() == synthetic.get_config("mqar")


@pytest.mark.parametrize(
    "arg, message",
    [
        ("mqra", "no preset 'mqra': did you mean 'mqar'"),
        ("mqar,mixer=mamab", "no mixer 'mamab': did you mean 'mamba'"),
        ("induction,vocabb=9", "'vocabb=9' is no key=value of induction: did you mean 'vocab'"),
        ("induction,vocab=x", "vocab=x: must be int"),
        ("modular_arithmetic,brackets=yes", "brackets=yes: must be True or False"),
        ("induction,vocab", "'vocab' is no key=value of induction"),
    ],
)
def test_bad_arguments_name_the_nearest(arg, message):
    with pytest.raises(UserError, match=message) as error:
        cli.load_config(f"configs/synthetic.py:{arg}")
    assert "\n" not in str(error.value)


def test_trials_of_the_sweeps_are_valid_and_differ():
    for name, sweep in synthetic.SWEEPS.items():
        trials, resolved = [], set()
        sweep(trials.append, "induction")
        for trial in trials:
            config = synthetic.get_config("induction")
            config.update_from_flattened_dict(trial)
            validate(config)
            build(config.model, 16)
            resolved.add(config.to_json())
        assert len(resolved) == len(trials) >= 2, name
    mixers = []
    synthetic.sweep(mixers.append, "induction")
    for mixer, trial in zip(synthetic.MIXERS, mixers, strict=True):  # what a trial makes is what `mixer=` makes
        config = synthetic.get_config("induction")
        config.update_from_flattened_dict(trial)
        wanted = synthetic.get_config(f"induction,mixer={mixer}")
        groups = {name for block in wanted.model.pattern.split() for name in block.split("+")} | {"dense", "pattern"}
        for name in (*groups, "short_conv"):
            assert config.model[name] == wanted.model[name]
        assert bool(wanted.model.short_conv) == (mixer in synthetic.CONVOLVED)
