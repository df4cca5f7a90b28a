"""Batches, windows and sources. No network, tiny texts."""

import gzip
import json
import lzma
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from seqmodels.data import prefetch, readers, text
from seqmodels.data.dataset import numbered
from seqmodels.data.permutation import permute
from seqmodels.errors import UserError
from tests.data_fixtures import POEM, data_config, open_, text_config

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Several documents of different length; the cache is built once for the module."""
    lines = [json.dumps({"text": f"document {i} " + "abc " * (i % 7) + "é\n"}) for i in range(200)]
    return text_config(tmp_path_factory.mktemp("data"), {"a.jsonl": "\n".join(lines)})


# --- order of rows


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 4097])
def test_permutation_is_one_to_one_and_new_every_epoch(size):
    orders = [permute(np.arange(size), size, seed=3, epoch=np.full(size, e)) for e in range(8)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(size))
    if size > 4:
        assert len({tuple(order) for order in orders}) > 1
    if size >= 64:
        assert not (permute(np.arange(size), size, 4, 0) == orders[0]).all()
        correlation = np.corrcoef(np.arange(size), orders[0])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(size)


def test_permutation_never_changes():
    """Resumed runs rely on it across versions of everything."""
    assert permute(np.arange(8), 8, seed=0, epoch=0).tolist() == [7, 2, 4, 0, 1, 5, 3, 6]


# --- batches


def test_batch_is_shifted_text_with_its_documents(config):
    data = open_(config)
    train, batch = data["train"], data.batch(5)
    tokens = np.asarray(train.tokens).astype(np.int64)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: ((4, 16), np.dtype(np.int32)) for k in ("tokens", "targets", "segment_ids")
    }
    for row, target, segments in zip(batch["tokens"], batch["targets"], batch["segment_ids"], strict=True):
        starts = [r for r in range(train.rows(16)) if (tokens[r * 16 : r * 16 + 16] == row).all()]
        assert any((tokens[s * 16 + 1 : s * 16 + 17] == target).all() for s in starts)
        counted = np.cumsum(row == data.tokenizer.separator)
        np.testing.assert_array_equal(segments - segments[0], counted - counted[0])


def test_documents_begin_with_the_separator_and_read_back(config):
    data = open_(config)
    texts = [json.loads(line)["text"] for line in Path(config.path.replace("*", "a.jsonl")).read_text().splitlines()]
    read, size = [], 0
    for split in ("train", "validation", "test"):
        part = data[split]
        assert (part.tokens[part.documents] == data.tokenizer.separator).all()
        assert (np.asarray(part.tokens) == data.tokenizer.separator).sum() == len(part.documents)
        read += [data.tokenizer.decode(ids) for ids in np.split(np.asarray(part.tokens), part.documents[1:])]
        size += part.bytes
    assert read == texts
    assert size == sum(len(t.encode()) for t in texts)


def test_batch_is_a_pure_function_of_seed_and_step(config):
    first, again = open_(config, seed=7), open_(config, seed=7)
    backwards = [again.batch(n) for n in (9, 3, 0)][::-1]
    for n, other in zip((0, 3, 9), backwards, strict=True):
        for name, value in first.batch(n).items():
            np.testing.assert_array_equal(value, other[name])
    assert not (first.batch(0)["tokens"] == open_(config, seed=8).batch(0)["tokens"]).all()


def test_every_row_once_an_epoch(config):
    data = open_(config, batch_size=7)
    rows = data["train"].rows(16)
    whole = data["train"].read(range(rows), 16)["tokens"]
    steps = -(-2 * rows // 7)
    seen = np.concatenate([data.batch(n)["tokens"] for n in range(steps)])
    first, second = seen[:rows], seen[rows : 2 * rows]
    assert sorted(map(bytes, first)) == sorted(map(bytes, whole)) == sorted(map(bytes, second))
    assert not (first == second).all()
    assert data.steps_per_epoch == rows / 7


@pytest.mark.parametrize("bptt", [False, True])
def test_host_slices_make_up_the_global_batch(config, bptt):
    data = open_(config, batch_size=6, bptt=bptt)
    for n in (0, 11):
        whole = data.batch(n)
        for hosts in (2, 3):
            size = 6 // hosts
            parts = [data.batch(n, rows=slice(h * size, (h + 1) * size)) for h in range(hosts)]
            for name in whole:
                np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), whole[name])


def test_bptt_rows_go_on_and_change_segment_when_they_begin_anew(tmp_path):
    data = open_(text_config(tmp_path, {"one.txt": POEM}), batch_size=3, bptt=True)
    stream = int(data.steps_per_epoch)
    batches = [data.batch(n) for n in range(2 * stream + 1)]
    for n in range(stream - 1):
        np.testing.assert_array_equal(batches[n]["targets"][:, -1], batches[n + 1]["tokens"][:, 0])
        np.testing.assert_array_equal(batches[n]["segment_ids"][:, -1], batches[n + 1]["segment_ids"][:, 0])
    whole = np.concatenate([b["tokens"] for b in batches[:stream]], axis=1)
    np.testing.assert_array_equal(whole.reshape(-1), data["train"].tokens[: whole.size])
    assert numbered(np.array([2**30 - 1, 2**30, 2**31, 2**40 + 5])).tolist() == [2**30 - 1, 0, 0, 5]  # int32 has 2^31
    for again in (stream, 2 * stream):  # one document: only the change of segment can reset the state
        np.testing.assert_array_equal(batches[again]["tokens"], batches[0]["tokens"])
        assert (batches[again]["segment_ids"][:, 0] != batches[again - 1]["segment_ids"][:, -1]).all()
        assert len({batches[again]["segment_ids"][b, 0] for b in range(3)}) == 1


def test_reset_off_runs_documents_together(config):
    config = config.copy_and_resolve_references()
    config.reset = False
    assert not open_(config).batch(0)["segment_ids"].any()
    assert not next(open_(config)["test"].windows(16))["segment_ids"].any()


@pytest.mark.parametrize("length", [1, 16, 33, 100_000])
def test_windows_read_each_target_once(config, length):
    data = open_(config)
    part = data["validation"]
    batches = list(part.windows(length, batch_size=3))
    assert {b["tokens"].shape for b in batches} == {(3, length)}
    mask = np.concatenate([b["mask"] for b in batches])
    for name, expected in (("tokens", part.tokens[:-1]), ("targets", part.tokens[1:])):
        np.testing.assert_array_equal(np.concatenate([b[name] for b in batches])[mask], expected)
    segments = np.concatenate([b["segment_ids"] for b in batches])[mask]
    np.testing.assert_array_equal(segments, part.segment_ids(0, len(part.tokens) - 1))
    limited = list(part.windows(length, batch_size=2, limit=1))
    assert len(limited) == 1 and not limited[0]["mask"][1].any()
    if (rows := part.row_count(length)) > 5:  # a row of each fifth of the split
        chosen = np.concatenate([b["tokens"] for b in part.windows(length, batch_size=3, limit=5)])
        numbers = [n * rows // 5 for n in range(5)]
        np.testing.assert_array_equal(chosen[:5], np.concatenate([b["tokens"] for b in batches])[numbers])
        assert not chosen[5:].any() and numbers[-1] >= rows * 4 // 5


def test_prefetch_equals_batches_and_ends_its_thread(config):
    data = open_(config)
    with prefetch(data, 4, rows=slice(1, 3)) as batches:
        for n in range(4, 9):
            np.testing.assert_array_equal(next(batches)["tokens"], data.batch(n)["tokens"][1:3])
        thread = batches._thread
    assert not thread.is_alive() and thread not in threading.enumerate()
    assert next(batches, None) is None
    batches.close()


def test_prefetch_raises_what_the_thread_met():
    class Broken:
        def batch(self, n, rows):
            raise ValueError("disk on fire")

    with prefetch(Broken(), 0) as batches, pytest.raises(ValueError, match="disk on fire"):
        next(batches)


# --- the embedded corpus and local text


def test_embedded_corpus_is_48_works_with_both_authors_in_each_split():
    works = list(text.works())
    assert len(works) == 48 and len({title for _, title, _ in works}) == 48
    total = sum(len(body) for _, _, body in works)
    for split, share in (("train", 0.88), ("validation", 0.06), ("test", 0.06)):
        bodies = [body for of, _, body in works if of == split]
        assert abs(sum(map(len, bodies)) / total - share) < 0.01
        for author in ("William Shakespeare", "Jane Austen"):
            assert any(author in body[:120] for body in bodies), (split, author)
    raw = lzma.decompress(text.EMBEDDED.read_bytes()).decode()
    assert "".join(raw.split()) == "".join("".join(body for _, _, body in works).split())


def test_cut_gives_everything_once_and_in_order():
    documents = [POEM, "short\n", POEM[:3000], "a" * 50_000, "ü b " * 4000]
    total = sum(map(len, documents))
    parts = {split: list(text.cut(documents, total, split)) for split in ("train", "validation", "test")}
    assert "".join("".join(p) for p in parts.values()) == "".join(documents)
    for split, share in (("train", 0.9), ("validation", 0.05), ("test", 0.05)):
        assert abs(sum(map(len, parts[split])) / total - share) < 0.02, split


def test_cut_falls_on_line_ends_and_keeps_small_documents_whole():
    parts = [list(text.cut([POEM], len(POEM), split)) for split in ("train", "validation", "test")]
    assert [len(p) for p in parts] == [1, 1, 1] and all(p[0].endswith("\n") for p in parts)
    odd = "title\n" + "word " * 10_000  # no line end near the borders
    parts = [list(text.cut([odd], len(odd), split)) for split in ("train", "validation", "test")]
    assert [round(len("".join(p)) / len(odd), 2) for p in parts] == [0.9, 0.05, 0.05]
    assert all(p[0].endswith("word ") for p in parts)
    small = [f"document {i}\n" for i in range(1000)]
    parts = [list(text.cut(small, sum(map(len, small)), split)) for split in ("train", "validation", "test")]
    assert [d for part in parts for d in part] == small


def test_all_kinds_of_files_are_read(tmp_path):
    line = json.dumps({"body": "from json\n"}).encode()
    files = {
        "a.txt": b"\xef\xbb\xbfplain\n",
        "b.txt.xz": lzma.compress(b"xz\n"),
        "c.txt.gz": gzip.compress(b"gz\n"),
        "d.jsonl": line + b"\n\n" + line,
        "e.jsonl.gz": gzip.compress(line),
        "f.txt": b" \n",
    }
    config = text_config(tmp_path, files)
    documents = list(readers.read_all(readers.find_files(config.path), "body"))
    assert documents == ["plain\n", "xz\n", "gz\n", "from json\n", "from json\n", "from json\n"]


def test_xz_figure_is_that_of_the_raw_text(tmp_path):
    data = open_(text_config(tmp_path, {"one.txt": POEM}))
    for split in ("train", "validation", "test"):
        raw = data.tokenizer.decode(data[split].tokens).encode()
        assert len(raw) == data[split].bytes
        assert data.xz_bits_per_byte(split) == 8 * len(lzma.compress(raw, preset=9)) / len(raw)


# --- tensorflow-datasets


@pytest.mark.parametrize("name", ["lm1b", "wiki40b/en", "c4"])
def test_public_datasets_by_name(tmp_path, monkeypatch, name):
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr("seqmodels.data.sources._check_network", lambda builder: None)  # mock_data needs none
    with tfds.testing.mock_data(num_examples=30):
        data = open_(data_config(tmp_path, name=name), seq_len=8)
    assert [len(data[s].documents) for s in ("train", "validation", "test")] == [30, 30, 30]
    assert data.batch(0)["tokens"].shape == (4, 8)
    assert open_(data_config(tmp_path, name=name), seq_len=8).folder == data.folder  # from the cache, without the mock
    assert "tensorflow" not in sys.modules


@pytest.fixture
def prepared(tmp_path):
    """Makes a prepared dataset with given splits and returns its folder."""
    tfds = pytest.importorskip("tensorflow_datasets")

    def make(splits):
        class Poems(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = tfds.features.FeaturesDict({"poem": tfds.features.Text()})
                return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split) for split in splits}

            def _generate_examples(self, split):
                for i in range(100):
                    yield i, {"poem": f"{split} {i}"}

        builder = Poems(data_dir=str(tmp_path / "prepared"), file_format="array_record")
        builder.download_and_prepare()
        return str(builder.data_dir)

    return make


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (["train"], {"train": ("train", 0, 90), "validation": ("train", 90, 95), "test": ("train", 95, 100)}),
        (["train", "test"], {"train": ("train", 0, 95), "validation": ("train", 95, 100), "test": ("test", 0, 100)}),
        (
            ["train", "validation"],
            {"train": ("train", 0, 95), "validation": ("validation", 0, 100), "test": ("train", 95, 100)},
        ),
    ],
)
def test_missing_splits_are_cut_from_train(tmp_path, prepared, splits, expected):
    data = open_(data_config(tmp_path, name="poems", path=prepared(splits), text_key="poem"))
    for split, (of, first, last) in expected.items():
        part = data[split]
        documents = [data.tokenizer.decode(ids) for ids in np.split(np.asarray(part.tokens), part.documents[1:])]
        assert documents == [f"{of} {i}" for i in range(first, last)]


def test_prepared_dataset_without_train_split(tmp_path, prepared):
    with pytest.raises(UserError, match="has no train split, only test"):
        open_(data_config(tmp_path, name="poems", path=prepared(["test"]), text_key="poem"))


def test_dataset_that_cannot_be_had_offline(tmp_path, monkeypatch):
    def no_address(*args):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", no_address)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(UserError) as error:
        open_(data_config(tmp_path, name="lm1b"))
    message = str(error.value)
    for part in ("config.data.name='lm1b'", "no network: www.statmt.org", "TensorFlow", "config.data.path", "'text'"):
        assert part in message
    assert "\n" not in message


# --- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(name="wiki40c/en"), r"config\.data\.name='wiki40c/en': no such dataset \(nearest: wiki40b"),
        (dict(name="shakespeare"), r"no such dataset \(nearest: .*shakespeare_austen"),
        (dict(name="wiki40b/xx"), r"config\.data\.name='wiki40b/xx': no such config or version; there are .*en"),
        (dict(name="pg19"), r"config\.data\.text_key='text': 'pg19' has the features book_text"),
        (dict(name="lm1b", path="/nowhere"), r"config\.data\.path='/nowhere': no prepared dataset"),
        (dict(name=""), r"config\.data\.name='': must be 'shakespeare_austen'"),
        (dict(name="who/tales"), r"no such dataset.*; of the Hugging Face Hub: config\.data\.name=hf:who/tales$"),
        (dict(path="who/tales"), r"matches no file; of the Hugging Face Hub: config\.data\.name=hf:who/tales$"),
        (dict(path="x.txt"), r"config\.data\.path='x.txt': matches no file$"),
        (
            dict(held_out="documents"),
            r"config\.data\.held_out='documents': is for files",
        ),
        (dict(name="text"), r"config\.data\.path='': config\.data\.name='text' needs files, a glob or a folder"),
        (dict(name="text", path="/nowhere/*.txt"), r"config\.data\.path='/nowhere/\*\.txt': matches no file"),
        (dict(cache="/dev/null/cache"), r"config\.data\.cache='/dev/null/cache': cannot be written"),
    ],
)
def test_bad_fields(tmp_path, fields, message):
    with pytest.raises(UserError, match=message) as error:
        open_(data_config(tmp_path, **fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.pdf": "x"}, r"a\.pdf must end in \.txt, .* or \.arrow, or these and \.xz, .* or \.zst"),
        ({"a.txt": ""}, r"config\.data\.path='.*': no text in 1 file"),
        ({"a.txt": "  \n", "b.jsonl": "\n"}, r"no text in 2 file"),
        ({"a.txt": b"caf\xe9 noir"}, r"a\.txt is not UTF-8 \(byte 3\): convert it"),
        ({"a.txt.xz": b"plain"}, r"a\.txt\.xz is damaged or not xz"),
        ({"a.txt.gz": gzip.compress(b"plain text" * 99)[:30]}, r"a\.txt\.gz is damaged or not gz"),
        ({"a.jsonl": '{"text": "x"}\nnot json'}, r"a\.jsonl:2 is not JSON"),
        ({"a.jsonl": '{"body": "x"}'}, r"config\.data\.text_key='text': .*a\.jsonl:1 has the keys body"),
        ({"a.jsonl": '{"text": 3}'}, r"a\.jsonl:1 holds no string under config\.data\.text_key='text'"),
        ({"a.txt": "ab"}, r"config\.data\.path='.*': 2 characters are too few to cut a validation split"),
    ],
)
def test_bad_files(tmp_path, files, message):
    with pytest.raises(UserError, match=message) as error:
        open_(text_config(tmp_path, files))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("tokens/text-*"))


def test_bad_sizes(tmp_path):
    config = text_config(tmp_path, {"a.txt": "word " * 100})
    tokens = len(open_(config)["train"].tokens)
    with pytest.raises(UserError, match=rf"config\.seq_len=512: the train split has {tokens} tokens, a row needs 513"):
        open_(config, seq_len=512)
    with pytest.raises(UserError, match=r"config\.batch_size=99: with config\.training\.bptt"):
        open_(config, batch_size=99, bptt=True)
    with pytest.raises(UserError, match=r"config\.seq_len=0: must be at least 1"):
        open_(config, seq_len=0)
    with pytest.raises(UserError, match=r"config\.batch_size=0: must be at least 1"):
        open_(config, batch_size=0)
    with pytest.raises(UserError, match="split 'dev': must be one of train, validation, test"):
        open_(config)["dev"]


# --- the docs


def test_example_of_the_docs_runs(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text()
    (example,) = [block.removeprefix("python\n") for block in page.split("```")[1::2] if block.startswith("python\n")]
    command = [sys.executable, "-W", "error", "-c", example]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert "dark and stormy" in result.stdout and "bits per byte" in result.stdout


@pytest.mark.parametrize("name", ["a[1].txt", "a b=c,d.txt", "ü{x}?*.txt", "two\nlines.txt"])
def test_files_of_any_name(tmp_path, name):
    config = text_config(tmp_path, {name: POEM})
    config.path = str(tmp_path / "raw" / name)
    right = text_config(tmp_path, {name: POEM})
    np.testing.assert_array_equal(open_(config).batch(0)["tokens"], open_(right).batch(0)["tokens"])
