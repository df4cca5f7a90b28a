"""Mixtures of sources, and text that is streamed."""

import collections
import itertools
import re
import shutil
import sys
import types

import numpy as np
import pytest

from seqmodels.data import load, mixture
from seqmodels.data.mixture import CYCLE
from seqmodels.errors import UserError
from tests.data_fixtures import POEM, data_config


def write(tmp_path, name, count=200):
    """A folder of so many documents, each of which begins with the name."""
    folder = tmp_path / name
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03}.txt").write_text(f"{name} {number} " + POEM[number * 7 : number * 7 + 50 + number])
    return folder


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


# Mixtures


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.5, 0.25, 0.25), (0.999, 0.001)])
def test_any_beginning_of_the_rows_has_the_shares_to_within_a_row(weights):
    order = np.concatenate([mixture.cycle(weights)] * 2)
    for source, share in enumerate(weights):
        counts = np.cumsum(order == source)
        assert np.abs(counts - share * np.arange(1, 2 * CYCLE + 1)).max() <= 1


def test_rows_of_a_mixture_are_those_of_its_sources_in_their_order(tmp_path):
    paths = [write(tmp_path, "one"), write(tmp_path, "two")]
    config = data_config(tmp_path, mixture=f"3 {paths[0]}; 1 {paths[1]}", held_out="documents")
    mixed = load(config, seq_len=16, batch_size=4, seed=5)
    ones = [data_config(tmp_path, name="text", path=str(path), held_out="documents") for path in paths]
    alone = [load(one, seq_len=16, batch_size=1, seed=5 + n) for n, one in enumerate(ones)]
    taken = collections.Counter()
    for n in range(30):
        batch = mixed.batch(n)
        for row in range(4):
            source, number = mixed.place(4 * n + row)
            assert number == taken[source]
            taken[source] += 1
            mine = {name: array[row] for name, array in batch.items()}
            assert same(mine, {name: array[0] for name, array in alone[source].batch(number).items()})
    assert abs(taken[0] - 90) <= 1
    again = load(config, seq_len=16, batch_size=4, seed=5)  # a resumed run
    last = mixed.batch(29)
    assert same(again.batch(29), last)
    assert same(again.batch(29, slice(1, 3)), {name: array[1:3] for name, array in last.items()})

    split = mixed["validation"]
    assert np.array_equal(split.tokens, np.concatenate([part["validation"].tokens for part in alone]))
    assert split.bytes == sum(part["validation"].bytes for part in alone) == split.bytes_of(7)
    assert split.bytes_of(100, 1) == alone[0]["validation"].bytes_of(100, 1)
    assert np.array_equal(split.tokens[split.documents], np.full(len(split.documents), 256))
    assert mixed.xz_bits_per_byte("test") > 0 and mixed.fingerprints.keys() >= {"tokenizer", "train of source 1"}


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(mixture="0.5 a"), "at least two sources"),
        (dict(mixture="a; b"), "must be like"),
        (dict(mixture="-1 a; 2 b"), "must be like"),
        (dict(mixture="0.9996 a; 0.0004 b"), "about 1/1000 or more; b has 0.0004 and would never be read"),
        (dict(mixture="1 a; 2 b", path="c"), "config.data.path='c': must be ''"),
        (dict(mixture="1 nowhere; 2 b"), "'nowhere': matches no file"),
    ],
)
def test_wrong_mixtures_are_one_line(tmp_path, fields, words):
    with pytest.raises(UserError, match=words):
        load(data_config(tmp_path, **fields), seq_len=16, batch_size=4)
    with pytest.raises(UserError, match=r"bptt=True: must be False with config.data.mixture"):
        load(data_config(tmp_path, **fields), seq_len=16, batch_size=4, bptt=True)


# Streams


def stream(tmp_path, path, **fields):
    fields = dict(shuffle_buffer=30, held_out="documents") | fields
    return load(
        data_config(tmp_path, name="text", path=str(path), streaming=True, **fields), seq_len=16, batch_size=4, seed=3
    )


def test_a_stream_has_every_document_once_an_epoch_in_a_random_order(tmp_path):
    path = write(tmp_path, "one")
    streamed = stream(tmp_path, path)
    assert not (tmp_path / "cache" / "tensorflow_datasets").exists()  # no copy of the text
    assert not list((tmp_path / "cache").rglob("train"))
    whole = load(data_config(tmp_path, name="text", path=str(path), held_out="documents"), seq_len=16, batch_size=4)
    tokens = np.concatenate([streamed.batch(n)["tokens"].ravel() for n in range(2 * len(whole["train"].tokens) // 64)])
    texts = [whole.tokenizer.decode(ids) for ids in np.split(tokens, np.flatnonzero(tokens == 256))]
    train = whole["train"]
    documents = [whole.tokenizer.decode(ids) for ids in np.split(train.tokens, train.documents[1:])]
    first = [text for text in texts if text][: len(documents)]
    assert sorted(first) == sorted(documents) and first != documents
    assert sorted(first[:30]) == sorted(documents[:30])  # shuffled in blocks of the buffer
    second = [text for text in texts if text][len(documents) : 2 * len(documents) - 1]
    assert set(second) < set(documents) and second != first[: len(second)]
    assert np.array_equal(streamed["validation"].tokens, whole["validation"].tokens)

    shutil.rmtree(path)  # an evaluation needs no text
    assert np.array_equal(stream(tmp_path, path)["test"].tokens, whole["test"].tokens)


def test_a_stream_goes_on_from_any_step_bit_for_bit(tmp_path, monkeypatch):
    path = write(tmp_path, "one")
    first = stream(tmp_path, path)
    batches = [first.batch(n) for n in range(400)]  # some epochs
    assert (np.diff(np.concatenate([batch["segment_ids"].ravel() for batch in batches])) >= 0).all()
    for batch, following in itertools.pairwise(batches):
        flat = batch["targets"].ravel()
        assert np.array_equal(batch["tokens"].ravel()[1:], flat[:-1]) and flat[-1] == following["tokens"][0, 0]

    resumed = stream(tmp_path, path)
    read = []
    encode = resumed.tokenizer.encode_batch
    monkeypatch.setattr(resumed.tokenizer, "encode_batch", lambda texts: read.extend(texts) or encode(texts))
    assert same(resumed.batch(370), batches[370]) and len(read) <= 2 * 64  # what comes before is not tokenised
    for n in (371, 399, 2, 250):  # forwards and backwards
        assert same(resumed.batch(n), batches[n])
    (places,) = (tmp_path / "cache" / "streams").iterdir()
    places.write_text(places.read_text()[:-4])  # a crash
    assert same(stream(tmp_path, path).batch(399), batches[399])
    late = stream(tmp_path, path).batch(1000)
    kept = [line for line in places.read_text().splitlines() if re.search(r", 0, \d+\]$|, 1, [1-9]\d*\]$", line)]
    places.write_text("\n".join(kept) + "\n")  # the line of an epoch's beginning is lost
    assert any(line.endswith(", 1, 1]") for line in kept) and same(stream(tmp_path, path).batch(1000), late)
    places.unlink()
    assert same(stream(tmp_path, path).batch(30, slice(0, 2)), {k: v[:2] for k, v in batches[30].items()})


def test_a_stream_of_nothing_and_of_what_cannot_be_streamed(tmp_path):
    with pytest.raises(UserError, match="streaming=True: is for text files"):
        load(data_config(tmp_path, streaming=True), seq_len=16, batch_size=4)
    with pytest.raises(UserError, match="matches no file"):
        stream(tmp_path, tmp_path / "nowhere")


# The Hugging Face Hub


class Table:
    """What this project uses of `datasets.Dataset`, and of its streams."""

    def __init__(self, texts, fingerprint="f"):
        self.texts, self._fingerprint, self.column_names = texts, fingerprint, ["text", "number"]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        return {"text": self.texts[i], "number": i}

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def skip(self, n):
        return Table(self.texts[n:])


@pytest.fixture
def hub(monkeypatch):
    """The calls of a library that knows one data set."""
    calls = []
    texts = [f"document {i} {POEM[i : i + 60]}" if i % 9 else None for i in range(400)]

    def load_dataset(path, name, **options):
        calls.append((path, name, options))
        if path != "org/name":
            raise FileNotFoundError(f"Dataset '{path}' doesn't exist on the Hub\nmore")
        return {"train": Table(texts), "validation": Table(texts[:40])}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_a_name_of_the_hub(tmp_path, hub):
    dataset = load(data_config(tmp_path, name="hf:org/name:kind"), seq_len=16, batch_size=4)
    path, kind, options = hub[0]
    assert (path, kind) == ("org/name", "kind") and str(tmp_path) in options["cache_dir"]
    count = {split: len(dataset[split].documents) for split in ("train", "validation", "test")}
    blank = {"train": 380 - 43, "validation": 40 - 5, "test": 20 - 2}  # the test split is the last 5% of train
    assert count == blank
    assert dataset.tokenizer.decode(dataset["test"].tokens).startswith("document 380 ")
    load(data_config(tmp_path, name="hf:org/name:kind"), seq_len=16, batch_size=4)
    assert len(hub) == 1  # a finished cache needs no network


def test_a_stream_of_the_hub(tmp_path, hub):
    config = data_config(tmp_path, name="hf:org/name", streaming=True, shuffle_buffer=50)
    first = load(config, seq_len=16, batch_size=4)
    assert hub[0][2] == {"streaming": True} and first.held_out == ["validation"]
    batches = [first.batch(n) for n in range(900)]
    assert max(batch["segment_ids"].max() for batch in batches) > 2 * 355  # further than an epoch, blank rows left out
    assert same(load(config, seq_len=16, batch_size=4).batch(650), batches[650])


def test_hub_mistakes_are_one_line(tmp_path, hub, monkeypatch):
    with pytest.raises(UserError, match=r"'hf:org/nme': FileNotFoundError: Dataset 'org/nme' doesn't exist on the H"):
        load(data_config(tmp_path, name="hf:org/nme"), seq_len=16, batch_size=4)
    with pytest.raises(UserError, match="text_key='body': 'hf:org/name' has text, number"):
        load(data_config(tmp_path, name="hf:org/name", text_key="body"), seq_len=16, batch_size=4)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs datasets: pip install datasets"):
        load(data_config(tmp_path, name="hf:org/name"), seq_len=16, batch_size=4)
