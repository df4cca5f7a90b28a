"""A run goes on, and is evaluated, on the data that it was trained on; other data are refused, or named on purpose.

Kind: a silent change of what is computed (text or tokenizer changed under a run).
"""

import json
import os

import pytest
import tokenizers as tk

from seqmodels import cli, data
from seqmodels.configs import synthetic
from seqmodels.data import BatchSource
from seqmodels.errors import UserError
from seqmodels.evals.run import load_run
from seqmodels.scripts import eval as eval_script
from seqmodels.training import identity, loop
from tests.data_fixtures import POEM, data_config
from tests.run_fixtures import tiny, write_text


def save_tokenizer(path, text):
    made = tk.Tokenizer(tk.models.BPE())
    made.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([text], tk.trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet))
    made.save(str(path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps on a text with a tokenizer of its own, and their files."""
    text = write_text(tmp_path_factory.mktemp("text"))
    save_tokenizer(text / "bpe.json", "all is well, and it is")
    config = tiny(text, steps=2, checkpoint__every=2, data__tokenizer=str(text / "bpe.json"))
    loop.train(config, text / "run")
    return config, text, text / "run"


@pytest.fixture(params=["text", "tokenizer", "vocabulary"])
def changed(trained, request):
    """The same paths with other contents, for one test."""
    _, text, _ = trained
    path = text / ("corpus.txt" if request.param == "text" else "bpe.json")
    before = path.read_bytes()
    if request.param == "text":
        path.write_bytes(before.swapcase())
    elif request.param == "tokenizer":
        save_tokenizer(path, "xyz xyz yzx zyx zzz")
    else:
        made = tk.Tokenizer.from_file(str(path))
        made.add_tokens(["o'clock"])
        made.save(str(path))
    yield request.param
    path.write_bytes(before)


def test_changed_data_are_refused_when_a_run_goes_on(trained, changed):
    config, _, workdir = trained
    config = config.copy_and_resolve_references()
    config.steps = 4
    with pytest.raises(UserError) as error:
        loop.train(config, workdir)
    parts = "train, validation, test" if changed == "text" else "tokenizer"
    field = "path" if changed == "text" else "tokenizer"
    assert f"({parts})" in str(error.value) and f"config.data.{field}=" in str(error.value)
    assert "restore it, or name another --workdir" in str(error.value)


def test_changed_data_are_refused_by_an_evaluation(trained, changed):
    _, _, workdir = trained
    with pytest.raises(UserError, match=r"differs from what the run in .* read"):
        load_run(workdir)


def test_a_touched_or_moved_text_is_the_same_text(trained, tmp_path):
    _, text, workdir = trained
    (text / "corpus.txt").touch()
    assert load_run(workdir).step == 2
    (tmp_path / "bpe.json").write_bytes((text / "bpe.json").read_bytes())
    assert load_run(workdir, overrides={"data.tokenizer": str(tmp_path / "bpe.json")}).step == 2
    kept = json.loads((workdir / "data.json").read_text())
    assert set(kept) == {"tokenizer", "train", "validation", "test"}


def test_other_text_is_evaluated_when_it_is_named(trained, tmp_path, capsys):
    _, _, workdir = trained
    (tmp_path / "poem.txt").write_text(POEM)
    argv = ["eval.py", f"--workdir={workdir}", f"--out={tmp_path / 'out.json'}", "--evals=perplexity"]
    argv += [f"--config.data.path={tmp_path / 'poem.txt'}", "--splits=train,validation,test"]
    assert cli.run(eval_script.main, eval_script.define, "", argv) == 0, capsys.readouterr().err
    figures = json.loads((tmp_path / "out.json").read_text())
    assert sum(figures["bytes"].values()) == len(POEM)
    assert figures["data"] == {"name": "text", "path": str(tmp_path / "poem.txt")}


def test_other_text_needs_the_tokenizer_of_the_run(trained, tmp_path):
    _, _, workdir = trained
    save_tokenizer(tmp_path / "bpe.json", "xyz xyz yzx zyx zzz")
    (tmp_path / "poem.txt").write_text(POEM)
    with pytest.raises(UserError, match=r"config\.data\.tokenizer="):
        load_run(
            workdir,
            overrides={"data.path": str(tmp_path / "poem.txt"), "data.tokenizer": str(tmp_path / "bpe.json")},
        )


def test_a_run_of_an_earlier_version_has_no_fingerprints(trained):
    _, _, workdir = trained
    kept = (workdir / "data.json").read_text()
    (workdir / "data.json").unlink()
    try:
        assert load_run(workdir).step == 2
    finally:
        (workdir / "data.json").write_text(kept)


def test_every_kind_of_data_has_fingerprints(tmp_path):
    sizes = dict(seq_len=64, batch_size=2)
    config = synthetic.get_config("mqar").data
    found = data.load(config, **sizes).fingerprints
    assert set(found) == {"task"} and found == data.load(config, **sizes).fingerprints
    other = config.copy_and_resolve_references().unlock()
    other.task.power = config.task.power + 1
    assert data.load(other, **sizes).fingerprints != found
    own = BatchSource()
    assert identity.fingerprints(own) == {}  # not known
    identity.write(tmp_path, own)
    assert not list(tmp_path.iterdir())
    own.fingerprints = {"train": "a"}
    identity.write(tmp_path, own)
    identity.check(tmp_path, own, config, "")
    own.fingerprints = {"train": "b", "validation": "new"}
    with pytest.raises(UserError, match=r"config.data.name='mqar': differs .*\(train\); restore it"):
        identity.check(tmp_path, own, config, "restore it")


def test_a_text_is_found_by_its_contents(tmp_path):
    """Same size, same time, other text; and two folders that share a cache and a relative path."""
    source = tmp_path / "a.txt"
    source.write_text(POEM)
    config = data_config(tmp_path, name="text", path=str(source))
    first = data.load(config, seq_len=8, batch_size=1)
    times = source.stat().st_atime_ns, source.stat().st_mtime_ns
    source.write_text(POEM.swapcase())
    os.utime(source, ns=times)
    second = data.load(config, seq_len=8, batch_size=1)
    assert first.folder != second.folder and first.fingerprints != second.fingerprints
    source.unlink()
    assert data.load(config, seq_len=8, batch_size=1).folder in (first.folder, second.folder)


def test_folders_that_share_a_cache_do_not_share_texts(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "a.txt").write_text(POEM)
    config = data_config(tmp_path, name="text", path="a.txt")
    monkeypatch.chdir(tmp_path / "one")
    data.load(config, seq_len=8, batch_size=1)
    monkeypatch.chdir(tmp_path / "two")
    with pytest.raises(UserError, match="matches no file"):
        data.load(config, seq_len=8, batch_size=1)
