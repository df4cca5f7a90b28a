"""Token caches: made once, whole and by one process, of the text that is there."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from seqmodels.data import cache
from seqmodels.data.tokenizer import ByteTokenizer
from seqmodels.errors import UserError
from tests.data_fixtures import POEM, open_, text_config

ROOT = Path(__file__).parent.parent


def in_process(code, *, env=None):
    """Runs Python code in a fresh interpreter."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **(env or {})})


def test_finished_cache_needs_no_text_no_tfds_and_no_tensorflow(tmp_path):
    config = text_config(tmp_path, {"one.txt": POEM})
    before = open_(config).batch(3)["tokens"]
    shutil.rmtree(tmp_path / "raw")
    shutil.rmtree(tmp_path / "cache" / "tensorflow_datasets")
    result = in_process(f"""
        import sys
        from seqmodels.configs.base import base
        from seqmodels.data import load
        config = base().data
        config.update(dict(name="text", path={config.path!r}, cache={config.cache!r}))
        batch = load(config, seq_len=16, batch_size=4).batch(3)
        print(batch["tokens"].tolist())
        heavy = "tensorflow_datasets", "tensorflow", "sentencepiece", "tokenizers", "jax"
        assert not set(heavy) & set(sys.modules), set(heavy) & set(sys.modules)
    """)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == before.tolist()


def test_building_imports_no_tensorflow(tmp_path):
    config = text_config(tmp_path, {"one.txt": POEM})
    result = in_process(f"""
        import sys
        from seqmodels.configs.base import base
        from seqmodels.data import load
        config = base().data
        config.update(dict(name="text", path={config.path!r}, cache={config.cache!r}))
        load(config, seq_len=16, batch_size=4)
        assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
    """)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_changed_text_or_fields_make_another_cache(tmp_path):
    folders = []
    for content in (POEM, POEM + "more\n"):
        folders.append(open_(text_config(tmp_path, {"one.txt": content})).folder)
    folders.append(open_(text_config(tmp_path, {}, text_key="body")).folder)
    assert len(set(folders)) == 3
    assert open_(text_config(tmp_path, {})).folder == folders[1]


def test_killed_build_leaves_no_half_cache_and_the_next_one_succeeds(tmp_path):
    config = text_config(tmp_path, {f"{i}.txt": POEM for i in range(4)})
    result = in_process(f"""
        import os, signal
        from seqmodels.configs.base import base
        from seqmodels.data import cache, load
        from seqmodels.data.tokenizer import ByteTokenizer
        config = base().data
        config.update(dict(name="text", path={config.path!r}, cache={config.cache!r}))
        cache.BATCH_CHARACTERS = 1
        calls, encode = [], ByteTokenizer.encode_batch
        def dying(self, texts):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(self, texts)
        ByteTokenizer.encode_batch = dying
        load(config, seq_len=16, batch_size=4)
    """)
    assert result.returncode == -9, result.stderr
    left = [p.name for p in (tmp_path / "cache" / "tokens").iterdir() if not p.name.startswith(".")]
    assert len(left) == 1 and left[0].endswith(".partial")
    data = open_(config)
    assert sum(data[s].bytes for s in ("train", "validation", "test")) == 4 * len(POEM)
    assert not list((tmp_path / "cache" / "tokens").glob("*.partial"))


def test_processes_at_once_build_one_cache(tmp_path):
    config = text_config(tmp_path, {"one.txt": POEM})
    code = f"""
        from seqmodels.configs.base import base
        from seqmodels.data import load
        config = base().data
        config.update(dict(name="text", path={config.path!r}, cache={config.cache!r}))
        print(load(config, seq_len=16, batch_size=4).batch(0)["tokens"].tolist())
    """
    results = [None] * 3
    threads = [threading.Thread(target=lambda i=i: results.__setitem__(i, in_process(code))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.returncode for r in results] == [0, 0, 0], results[0].stderr
    assert len({r.stdout for r in results}) == 1
    assert len(list((tmp_path / "cache" / "tokens").glob("text-*"))) == 1


def test_hosts_without_common_locks_build_one_cache(tmp_path, monkeypatch):
    """A second host builds the same cache while the first does, and is ready before it."""
    config, hosts, encode = text_config(tmp_path, {"one.txt": POEM}), ["other"], ByteTokenizer.encode_batch

    def meanwhile(self, texts):
        if hosts:
            monkeypatch.setattr(cache, "HOST", hosts.pop())
            open_(config)
        return encode(self, texts)

    def no_locks(path, blocking):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("seqmodels.claim.locked", no_locks)
    monkeypatch.setattr(ByteTokenizer, "encode_batch", meanwhile)
    data = open_(config)
    assert not hosts and sum(data[s].bytes for s in ("train", "validation", "test")) == len(POEM)
    assert len(list((tmp_path / "cache" / "tokens").glob("text-*"))) == 1


def test_damaged_cache_is_named(tmp_path):
    config = text_config(tmp_path, {"one.txt": POEM})
    with (open_(config).folder / "test" / "tokens.bin").open("r+b") as file:
        file.truncate(10)
    with pytest.raises(UserError, match=r"config\.data\.cache: .* is damaged: delete it"):
        open_(config)
