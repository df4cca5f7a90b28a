"""Paths of clouds, against a bucket in memory: all but the lowest layer of fsspec is what a real one would run."""

import json

import fsspec
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

import seqmodels as sq
from seqmodels import cli, cloud
from seqmodels.errors import UserError
from seqmodels.training import checkpoint, loop, metrics
from tests.run_fixtures import tiny, write_text


class Bucket(MemoryFileSystem):
    """gs:// in memory. Paths begin with the bucket, as those of gcsfs."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))

    def glob(self, path, **options):
        return [name.lstrip("/") for name in super().glob(path, **options)]


@pytest.fixture(autouse=True)
def bucket(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    cloud.local_files.cache_clear()
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    return epath.Path("gs://bucket")


def test_what_changes_is_sent(bucket):
    with cloud.copied("gs://bucket/run") as copy:
        for name in ("config.json", "run.lock", "a.tmp", "checkpoints/3/params/x", "checkpoints/9.orbax-tmp/x"):
            (copy.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (copy.folder / name).write_text("old")
        copy.send()
        assert [name for name, _ in cloud.files(bucket / "run")] == ["checkpoints/3/params/x", "config.json"]
        (bucket / "run/config.json").write_text("not sent again")
        copy.send()
        assert (bucket / "run/config.json").read_text() == "not sent again"
        (copy.folder / "config.json").write_text("longer")
        (copy.folder / "checkpoints/3/params/x").unlink()
        copy.send()
    assert not copy.folder.exists()
    with cloud.copied("gs://bucket/run") as again:
        assert {path.name: path.read_text() for path in again.folder.rglob("*") if path.is_file()} == {
            "config.json": "longer"
        }


def test_a_run_in_a_cloud_is_that_of_a_folder(bucket, tmp_path, capsys):
    write_text(tmp_path)
    (bucket / "books").mkdir(parents=True)
    (bucket / "books/corpus.txt").write_text((tmp_path / "corpus.txt").read_text())

    def losses(workdir, path, *steps):
        for each in steps:
            config = tiny(
                tmp_path, steps=each, optimizer__schedule="constant", optimizer__warmup=0.0, checkpoint__keep=1
            )
            config.data.path, config.data.cache = path, str(tmp_path / "cache")
            loop.train(config, workdir)

    losses(tmp_path / "run", str(tmp_path / "corpus.txt"), 4)
    losses("gs://bucket/runs/one", "gs://bucket/books/*.txt", 2, 4)
    said = capsys.readouterr().out
    assert "after step 2" in said and "copy     of gs://bucket/runs/one" in said
    with cloud.copied("gs://bucket/runs/one") as copy:
        rows = [[row["loss"] for row in metrics.read(folder / "metrics.jsonl") if "loss" in row]
                for folder in (tmp_path / "run", copy.folder)]  # fmt: skip
        assert len(rows[0]) == 4 and rows[0] == rows[1]
        assert checkpoint.steps(copy.folder / "checkpoints") == [4]
        summary = json.loads((copy.folder / "summary.json").read_text())
    assert summary["steps"] == 4

    here, there = sq.load(tmp_path / "run"), sq.load("gs://bucket/runs/one")
    np.testing.assert_array_equal(here.logits("It is"), there.logits("It is"))


def test_results_of_a_command_are_sent(bucket):
    (bucket / "run").mkdir(parents=True)
    with cli.run_folder("gs://bucket/run") as folder:
        folder.mkdir(exist_ok=True)
        (folder / "eval.json").write_text("{}")
    assert (bucket / "run/eval.json").read_text() == "{}"


def test_texts_are_copied_once_more_where_they_changed(bucket, tmp_path):
    (bucket / "a/b").mkdir(parents=True)
    for name in ("a/one.txt", "a/b/two.md", "a/three.png"):
        (bucket / name).write_text(name)
    from seqmodels.data.readers import find_files

    assert [path.name for path in find_files("gs://bucket/a")] == ["two.md", "one.txt"]
    assert [path.name for path in find_files("gs://bucket/a/*.txt, gs://bucket/a/b/two.md")] == ["one.txt", "two.md"]
    assert find_files("gs://bucket/nothing") == []
    (bucket / "a/one.txt").write_text("a/ONE.txt")
    cloud.local_files.cache_clear()
    assert find_files("gs://bucket/a/one.txt")[0].read_text() == "a/ONE.txt"


@pytest.mark.parametrize(
    "address, words",
    [
        ("ftp://host/run", "must begin with gs://, s3://, az://, or be a folder"),
        ("s3://bucket/run", "pip install s3fs"),
    ],
)
def test_what_cannot_be_reached_is_one_line(address, words):
    with pytest.raises(UserError, match=words), cloud.copied(address):
        pass


def test_a_sweep_needs_a_folder():
    with pytest.raises(UserError, match="gs://bucket/sweep: must be a folder here"):
        cli.folder_of("gs://bucket/sweep")
