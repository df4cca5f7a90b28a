"""Every file that a run writes and reads, damaged in every way: the right result, or one line that names the file."""

import gc
import json
import os
import shutil

import jax
import numpy as np
import pytest

from seqmodels import data
from seqmodels.data import load_tokenizer
from seqmodels.errors import UserError
from seqmodels.sweeps import definition, results
from seqmodels.sweeps.trial import FINAL, OPEN, Trial
from seqmodels.training import board, checkpoint, loop, metrics, report, run, sharding
from seqmodels.training.state import abstract_params
from tests.damages import DAMAGES, restore
from tests.run_fixtures import tiny, write_text


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config, run directory) of a run of six steps."""
    text = write_text(tmp_path_factory.mktemp("text"), lines=40)
    config = tiny(text, metrics__tensorboard=True)
    workdir = tmp_path_factory.mktemp("runs") / "run"
    loop.train(config, workdir)
    return config, workdir


@pytest.fixture
def mine(finished, tmp_path):
    """A copy of the run directory."""
    shutil.copytree(finished[1], tmp_path / "run")
    return tmp_path / "run"


def told(read, *names):
    """What `read` returns, or None where it ends with one line that has one of the names."""
    try:
        return read()
    except UserError as error:
        assert "\n" not in str(error) and any(name in str(error) for name in names), error
        return None


@pytest.mark.parametrize("how", DAMAGES)
def test_config_of_a_run(finished, mine, how):
    DAMAGES[how](mine / "config.json")
    assert told(lambda: run.read_config(mine), "config.json") is None
    told(lambda: run.check_run(mine, finished[0]), "config.json")


@pytest.mark.parametrize("how", DAMAGES)
def test_summary(mine, how, capsys):
    before = report.read_summary(mine)
    DAMAGES[how](mine / "summary.json")
    found = told(lambda: report.read_summary(mine), "summary.json")
    assert found in (None, before)
    if how not in ("deleted", "dangling", "a directory"):
        assert "summary.json is damaged; it is made anew" in capsys.readouterr().err


@pytest.mark.parametrize("how", DAMAGES)
def test_metrics(finished, mine, how, capsys):
    path = mine / "metrics.jsonl"
    before = [row for row in metrics.read(path) if not metrics.is_final(row)]  # that evaluation is done again
    DAMAGES[how](path)

    def resumed():
        writer = metrics.Metrics(mine, 6, finished[0])
        writer.write(7, {"loss": 1.0})
        writer.close()
        return metrics.read(path)

    rows = told(resumed, "metrics.jsonl")
    if rows is not None:
        assert rows[-1]["step"] == 7 and all(row in before for row in rows[:-1])
        said = capsys.readouterr().err
        assert rows[:-1] == before or "metrics.jsonl" in said or how == "cut in half"


@pytest.mark.parametrize("how", DAMAGES)
def test_events_of_tensorboard(finished, mine, how):
    (path,) = mine.glob(board.PREFIX + "*")
    before = {step for step, values, _ in board.events(path) if values}
    DAMAGES[how](path)

    def resumed():
        metrics.Metrics(mine, 6, finished[0]).close()
        return [step for each in mine.glob(board.PREFIX + "*") for step, values, _ in board.events(each) if values]

    steps = told(resumed, path.name, "metrics.jsonl")
    assert steps is None or (set(steps) <= before and len(set(steps)) == len(steps))


# Orbax leaves coroutines behind where it cannot read an array; Python reports them when it collects them.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_checkpoints(finished, mine, tmp_path):
    """The newest is read right, or the one before it, or nothing is: never other numbers."""
    config, _ = finished
    abstract = abstract_of(config)
    right = {
        step: jax.tree.map(np.asarray, checkpoint.restore_params(mine / "checkpoints", abstract, step=step)[1])
        for step in (3, 6)
    }
    folder, copy = mine / "checkpoints" / "6", tmp_path / "copy"
    shutil.copytree(folder, copy)
    for file in [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]:
        if file.parts[0] in ("rest", "metrics"):
            continue
        for how in ("empty", "cut in half", "0xff", "an object", "deleted", "a directory"):
            DAMAGES[how](folder / file)
            step, found = checkpoint.restore_params(mine / "checkpoints", abstract)
            jax.tree.map(np.testing.assert_array_equal, found, right[step])
            restore(copy, folder)
    gc.collect()


def abstract_of(config):
    mesh = sharding.make_mesh(config)
    dataset = data.load(config.data, seq_len=config.seq_len, batch_size=config.batch_size)
    boxed = abstract_params(loop.build_for(config.model, dataset), config)
    return jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
        sharding.unbox(boxed),
        sharding.param_shardings(boxed, mesh),
    )


@pytest.mark.parametrize("name", ["00041", "٤", "7", "8.orbax-checkpoint-tmp", "step"])
def test_names_beside_the_checkpoints(mine, name, capsys):
    """What no run names so is no checkpoint; a link to nothing is one that cannot be read."""
    (mine / "checkpoints" / name).symlink_to("gone")
    there = checkpoint.steps(mine / "checkpoints")
    assert there == ([7, 6, 3] if name == "7" else [6, 3])


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(24, "Too many open files"), "Too many open files"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (MemoryError(), "Cannot allocate memory"),
        (ValueError("RESOURCE_EXHAUSTED: open failed [OS error 24: EMFILE Too many open files]"), "Too many open"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_system_refuses_is_not_called_damage(finished, mine, monkeypatch, error, words):
    def refuse(path, *_):
        if path.name == "6":
            raise error
        raise AssertionError("an older checkpoint is not to be taken")

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", refuse)
    with pytest.raises(UserError, match=f"checkpoints/6 cannot be read .{words}.*it may be whole"):
        checkpoint.restore_params(mine / "checkpoints", abstract_of(finished[0]))
    assert checkpoint.steps(mine / "checkpoints") == [6, 3]


@pytest.mark.parametrize("checksums", [True, False], ids=["with checksums", "of an earlier version"])
def test_token_cache(finished, tmp_path, checksums):
    config = finished[0].copy_and_resolve_references()
    config.data.cache = str(tmp_path / "cache")

    def batch():
        dataset = data.load(config.data, seq_len=16, batch_size=4)
        return {"folder": dataset.folder, **dataset.batch(0)}

    right = batch()
    folder, copy = right["folder"], tmp_path / "copy"
    if not checksums:
        meta = json.loads((folder / "meta.json").read_text())
        for split, part in meta["splits"].items():
            del part["files"], part["sha256"]
            (folder / split / "sizes.bin").unlink()
            (folder / split / "wide.npy").unlink()
        (folder / "meta.json").write_text(json.dumps(meta))
        (folder / "checked.json").unlink()
    shutil.copytree(folder, copy)
    sizes = ("train/sizes.bin", "test/wide.npy") if checksums else ()
    for name in ("meta.json", "checked.json", "train/documents.npy", "train/tokens.bin", *sizes):
        for how, damage in DAMAGES.items():
            if (folder / name).exists():
                damage(folder / name)
            found = told(batch, str(folder))
            if found is not None:  # read right all the same, or made anew
                np.testing.assert_array_equal(found["tokens"], right["tokens"], err_msg=f"{name}, {how}")
                np.testing.assert_array_equal(found["segment_ids"], right["segment_ids"], err_msg=f"{name}, {how}")
            restore(copy, folder)


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    import io

    import sentencepiece
    import tokenizers

    folder, model = tmp_path_factory.mktemp("tokenizers"), io.BytesIO()
    texts = [f"line {n}: the quick brown fox jumps over the lazy dog" for n in range(100)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=60, minloglevel=2, hard_vocab_limit=False
    )
    (folder / "one.model").write_bytes(model.getvalue())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=80, show_progress=False))
    tokenizer.save(str(folder / "one.json"))
    return folder


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["one.model", "one.json"])
def test_tokenizer(tokenizer_files, tmp_path, name, how):
    path = tmp_path / name
    shutil.copy(tokenizer_files / name, path)
    before = load_tokenizer(str(path)).encode("the fox")
    DAMAGES[how](path)
    tokenizer = told(lambda: load_tokenizer(str(path)), str(path))
    assert tokenizer is None or tokenizer.encode("the fox") == before


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize(
    "name", ["trial.json", "summary.json", "eval.json", "metrics.jsonl", "trial.lock", "config.json"]
)
def test_files_of_a_trial(finished, tmp_path, name, how):
    workdir, folder = finished[1], tmp_path / "sweep"
    trial = Trial("one", folder / "trials" / "one", {"seed": 0}, {"steps": 6}, {"train": ("python",)}, "none")
    shutil.copytree(workdir, trial.workdir)
    (trial.workdir / "eval.json").write_text('{"step": 6}')
    (trial.workdir / "trial.lock").write_text("")
    trial.write({"status": "done", "attempts": 1})
    definition.keep(folder, "mamba", "ablation", [trial], "the command")
    DAMAGES[how](trial.workdir / name)
    assert trial.record()["status"] in (*FINAL, *OPEN)
    for read in (lambda: results.of_trials([trial], {}), lambda: results.of_runs([folder])):
        for result in told(read, name) or []:
            assert result.figures.get("validation.loss") is None or name != "summary.json"


@pytest.mark.parametrize("how", DAMAGES)
def test_file_of_a_sweep(tmp_path, how, capsys):
    trial = Trial("one", tmp_path / "trials" / "one", {"seed": 0}, {"steps": 6}, {"train": ("python",)}, "none")
    definition.keep(tmp_path, "mamba", "ablation", [trial], "the command")
    DAMAGES[how](tmp_path / "sweep.json")
    told(lambda: results.of_runs([tmp_path]), "sweep.json", str(tmp_path))
    commands = told(lambda: definition.keep(tmp_path, "mamba", "ablation", [trial], "another"), "sweep.json", "out")
    assert commands in (None, ["another"], ["the command", "another"])
    if how in ("0xff", "a list", "null"):
        assert "sweep.json is damaged" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
@pytest.mark.parametrize("name", ["config.json", "summary.json", "metrics.jsonl"])
def test_files_that_may_not_be_read(finished, mine, name):
    (mine / name).chmod(0)
    with pytest.raises(UserError, match=f"{name}.*Permission denied"):
        loop.train(finished[0], mine)


def test_a_damaged_summary_is_made_anew(finished, mine):
    before = (mine / "summary.json").read_text()
    (mine / "summary.json").write_text("{}")
    loop.train(finished[0], mine)
    assert json.loads((mine / "summary.json").read_text())["splits"] == json.loads(before)["splits"]


def test_a_finished_run_without_checkpoints_is_not_begun_again(finished, mine):
    rows = (mine / "metrics.jsonl").read_bytes()
    shutil.rmtree(mine / "checkpoints")
    config = finished[0].copy_and_resolve_references()
    config.steps = 8
    with pytest.raises(UserError, match="no checkpoint to go on from"):
        loop.train(config, mine)
    assert (mine / "metrics.jsonl").read_bytes() == rows
