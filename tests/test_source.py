"""The record of the source that a run was trained with: its commit and what differs from it."""

import json
import subprocess

import pytest

from seqmodels import source


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one file, which the module takes for ours."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "old.py").write_text("one = 1\ntwo = 2\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message=first")
    monkeypatch.setattr(source, "CHECKOUT", folder)
    monkeypatch.delenv("SEQMODELS_COMMIT", raising=False)
    source.source.cache_clear()
    yield folder
    source.source.cache_clear()


def entries(run):
    return json.loads((run / "source.json").read_text())


def test_the_commit_and_the_difference_give_the_files_back(tmp_path, checkout):
    run = tmp_path / "run"
    run.mkdir()
    source.write(run, 0)
    head = git(checkout, "rev-parse", "HEAD").strip()
    assert entries(run) == [{"step": 0, "commit": head, "diff": "", "version": source.__version__}]

    (checkout / "old.py").write_text("one = 1\ntwo = 3\n")
    (checkout / "mixer.py").write_text("new = 'ä'\n")
    (checkout / "data.bin").write_bytes(b"\0" * 100)  # no source
    source.source.cache_clear()
    for step in (20, 30):  # nothing is added where it is the same
        source.write(run, step)
    first, second = entries(run)
    assert first["diff"] == "" and (second["commit"], second["step"]) == (head, 20)

    again = tmp_path / "again"
    git(tmp_path, "clone", "--quiet", str(checkout), str(again))
    git(again, "checkout", "--quiet", second["commit"])
    git(again, "apply", str(run / second["diff"]))
    assert (again / "old.py").read_text() == "one = 1\ntwo = 3\n"
    assert (again / "mixer.py").read_text() == "new = 'ä'\n" and not (again / "data.bin").exists()


def test_the_short_commit_says_whether_files_differ(checkout, monkeypatch):
    short = git(checkout, "rev-parse", "--short", "HEAD").strip()
    assert source.commit() == short
    (checkout / "old.py").write_text("")
    assert source.commit() == short + "+"
    monkeypatch.setenv("SEQMODELS_COMMIT", "copied")
    assert source.commit() == "copied" == source.source().commit


def test_without_git_it_is_the_version(tmp_path, monkeypatch):
    source.source.cache_clear()
    monkeypatch.delenv("SEQMODELS_COMMIT", raising=False)
    monkeypatch.setattr(source, "CHECKOUT", None)
    assert source.source() == source.Source(source.__version__, "") and source.commit() == source.__version__
    source.source.cache_clear()
    monkeypatch.setattr(source, "CHECKOUT", tmp_path)  # no repository
    assert source.source().commit == source.__version__ and source.commit() == ""
    source.source.cache_clear()
