"""Files of token ids: nanoGPT's and Megatron's."""

import struct

import numpy as np
import pytest

from seqmodels.data import load
from seqmodels.errors import UserError
from tests.data_fixtures import POEM, data_config

DOCUMENTS = [np.frombuffer(line.encode(), np.uint8) for line in POEM.splitlines(keepends=True)]
SEPARATOR = 256


def nanogpt(path, documents):
    """As its prepare.py: each document and the separator behind it, uint16."""
    ids = np.concatenate([np.append(ids, SEPARATOR) for ids in documents]).astype(np.uint16)
    ids.tofile(path)
    return ids


def megatron(prefix, documents, kind=np.int32, code=4):
    """As Megatron's IndexedDatasetBuilder and _IndexWriter, with --append-eod; each document is one sequence."""
    sequences = [np.append(ids, SEPARATOR).astype(kind) for ids in documents]
    np.concatenate(sequences).tofile(prefix.with_suffix(".bin"))
    lengths = [len(ids) for ids in sequences]
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * np.dtype(kind).itemsize
    with open(prefix.with_suffix(".idx"), "wb") as file:
        file.write(b"MMIDIDX\x00\x00")
        file.write(struct.pack("<Q", 1))
        file.write(struct.pack("<B", code))
        file.write(struct.pack("<Q", len(sequences)))
        file.write(struct.pack("<Q", len(sequences) + 1))
        file.write(np.array(lengths, np.int32).tobytes())
        file.write(pointers.astype(np.int64).tobytes())
        file.write(np.arange(len(sequences) + 1, dtype=np.int64).tobytes())
    return np.concatenate(sequences)


def opened(tmp_path, path, **fields):
    config = data_config(tmp_path, name="text", path=str(path), **fields)
    return load(config, seq_len=16, batch_size=4)


def test_a_folder_of_nanogpt_is_used_where_it_lies(tmp_path):
    folder = tmp_path / "openwebtext"
    folder.mkdir()
    train, val = nanogpt(folder / "train.bin", DOCUMENTS[:300]), nanogpt(folder / "val.bin", DOCUMENTS[300:])
    dataset = opened(tmp_path, folder)
    # the test split is cut from the end of train
    assert np.array_equal(np.concatenate([dataset["train"].tokens, dataset["test"].tokens]), train)
    assert np.array_equal(dataset["validation"].tokens, val)
    assert (dataset.folder / "validation" / "tokens.bin").is_symlink()
    assert dataset["validation"].bytes == sum(map(len, DOCUMENTS[300:]))
    # each document has its own segment, which begins with the separator behind the one before
    borders = np.flatnonzero(np.diff(dataset["validation"].segment_ids(0, len(val)))) + 1
    assert np.array_equal(borders, np.flatnonzero(val == SEPARATOR))
    batch = dataset.batch(3)
    assert batch["tokens"].shape == (4, 16) and np.array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert "tokenizer bytes" in dataset.describe() and dataset.xz_bits_per_byte("validation") > 0


@pytest.mark.parametrize("kind, code", [(np.int32, 4), (np.uint16, 8)])
def test_megatron_and_nanogpt_give_the_same_batches(tmp_path, kind, code):
    nanogpt(tmp_path / "nano.bin", DOCUMENTS)
    megatron(tmp_path / "mega", DOCUMENTS, kind, code)
    one, other = opened(tmp_path, tmp_path / "nano.bin"), opened(tmp_path, tmp_path / "mega.bin")
    for split in ("train", "validation", "test"):
        assert np.array_equal(one[split].tokens, other[split].tokens)
        assert np.array_equal(one[split].documents, other[split].documents) and one[split].bytes == other[split].bytes
    assert all(np.array_equal(one.batch(5)[name], other.batch(5)[name]) for name in one.spec)
    assert one.fingerprints == other.fingerprints


def test_several_files_and_a_validation_file(tmp_path):
    for number in range(3):
        nanogpt(tmp_path / f"part{number}.bin", DOCUMENTS[100 * number : 100 * number + 100])
    val = nanogpt(tmp_path / "val.bin", DOCUMENTS[300:])
    parts = ",".join(str(tmp_path / f"part{number}.bin") for number in range(3))
    dataset = opened(tmp_path, parts, validation_path=str(tmp_path / "val.bin"), test_path=str(tmp_path / "val.bin"))
    whole = np.concatenate([np.fromfile(tmp_path / f"part{number}.bin", np.uint16) for number in range(3)])
    assert np.array_equal(dataset["train"].tokens, whole) and np.array_equal(dataset["test"].tokens, val)
    assert np.array_equal(dataset["train"].documents[1:], np.flatnonzero(whole == SEPARATOR))


@pytest.mark.parametrize(
    "write, words",
    [
        (lambda path: np.array([300], np.uint16).repeat(900).tofile(path), "has ids below 257, and .* holds 300"),
        (lambda path: path.write_bytes(b"abc"), "has 3 bytes, which are not ids of uint16"),
        (lambda path: (path.write_bytes(b"ab"), path.with_suffix(".idx").write_bytes(b"x" * 99)), "not an index"),
        (lambda path: None, "matches no file"),
    ],
)
def test_wrong_files_are_one_line(tmp_path, write, words):
    write(tmp_path / "a.bin")
    with pytest.raises(UserError, match=words) as error:
        opened(tmp_path, tmp_path / "a.bin")
    assert "\n" not in str(error.value)
