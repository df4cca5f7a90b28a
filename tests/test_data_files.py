"""Files of all kinds as data: readers, folders, and how splits are held out."""

import bz2
import csv
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from seqmodels.data import load
from seqmodels.data.local import drawn
from seqmodels.data.readers import find_files, read_all, read_documents
from seqmodels.errors import UserError
from tests.data_fixtures import POEM, data_config

TEXTS = ["first\n", 'with "quotes", commas\nand lines\n', "ümläut\n", "last"]
ROWS = [{"id": i, "body": text} for i, text in enumerate(TEXTS)]


def write(path, kind):
    """Writes ROWS as a file of a kind, by tools that others wrote."""
    if kind in (".parquet", ".arrow", ".feather"):
        table = pyarrow.table({"id": [row["id"] for row in ROWS], "body": TEXTS})
        if kind == ".parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=2)
        elif kind == ".arrow":  # a stream, as datasets.save_to_disk writes it
            with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table, max_chunksize=2)
        else:
            with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as whole:
                whole.write_table(table, max_chunksize=3)
    elif kind in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", "body"], delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == ".json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    else:  # lines
        path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (".parquet", "a.parquet"),
        (".arrow", "a.arrow"),
        (".feather", "b.arrow"),
        (".csv", "a.csv"),
        (".tsv", "a.tsv"),
        (".json", "a.json"),
        (".jsonl", "a.jsonl"),
        (".jsonl", "lines.json"),
    ],
)
def test_rows_of_a_table(tmp_path, kind, name):
    path = tmp_path / name
    write(path, kind)
    assert list(read_documents(path, "body")) == TEXTS
    with pytest.raises(UserError, match=r"config\.data\.text_key='text': .* has the keys id, body") as error:
        list(read_documents(path, "text"))
    assert "\n" not in str(error.value)
    if kind not in (".csv", ".tsv"):  # all cells are texts there
        with pytest.raises(UserError, match=r"no strings? under config\.data\.text_key='id'"):
            list(read_documents(path, "id"))


def test_compressed_files(tmp_path):
    (tmp_path / "a.txt.bz2").write_bytes(bz2.compress(b"bz2\n"))
    with pyarrow.output_stream(str(tmp_path / "b.jsonl.zst"), compression="zstd") as file:
        file.write(b'{"body": "one"}\n{"body": "two"}\n')
    with pyarrow.output_stream(str(tmp_path / "c.csv.zst"), compression="zstd") as file:
        file.write(b"body\nthree\n")
    assert list(read_all(find_files(str(tmp_path / "*")), "body")) == ["bz2\n", "one", "two", "three"]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.txt.bz2", "a.txt.zst", "a.json", "a.csv"])
def test_damaged_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"PAR1 {neither\x00 this nor that \xff\xfe")
    with pytest.raises(UserError, match=rf"config\.data\.(path|text_key).*{name}") as error:
        list(read_documents(tmp_path / name, "text"))
    assert "\n" not in str(error.value)


def test_folders_and_lists(tmp_path):
    for name in ("b/one.txt", "a/two.md", "a/picture.png", ".hidden/three.txt", "a/.four.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(pattern):
        return [str(path.relative_to(tmp_path)) for path in find_files(pattern)]

    assert names(str(tmp_path)) == ["a/two.md", "b/one.txt"]
    assert names(f"{tmp_path}/b, {tmp_path}/a/*.md") == ["b/one.txt", "a/two.md"]
    odd = tmp_path / "with, comma.txt"
    odd.write_text("x")
    assert names(str(odd)) == ["with, comma.txt"]
    with pytest.raises(UserError, match=r"'.*/c' matches no file"):
        find_files(f"{tmp_path}/b,{tmp_path}/c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no file that ends in \.txt"):
        find_files(str(tmp_path / "empty"))


def saved(folder, texts):
    """A folder as `datasets.save_to_disk` of datasets 4 writes it for a Dataset: the files that it lists count."""
    folder.mkdir(parents=True)
    table = pyarrow.table({"text": texts})
    name = str(folder / "data-00000-of-00001.arrow")
    with pyarrow.OSFile(name, "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "cache-1.arrow").write_bytes(b"of another time")


def documents(data, split):
    part = data[split]
    return [data.tokenizer.decode(ids) for ids in np.split(np.asarray(part.tokens), part.documents[1:])]


def open_(config):
    return load(config, seq_len=8, batch_size=2)


def test_saved_datasets(tmp_path):
    texts = [f"document {i} of a saved table\n" for i in range(100)]
    saved(tmp_path / "one", texts)
    data = open_(data_config(tmp_path, path=str(tmp_path / "one")))  # a path alone says that files are meant
    assert documents(data, "train")[:80] == texts[:80]
    assert "".join("".join(documents(data, s)) for s in ("train", "validation", "test")) == "".join(texts)

    for split, part in (("train", texts[:60]), ("validation", texts[60:80])):
        saved(tmp_path / "dict" / split, part)
    (tmp_path / "dict" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    data = open_(data_config(tmp_path, name="text", path=str(tmp_path / "dict")))
    assert documents(data, "validation") == texts[60:80]
    assert "".join(documents(data, "train") + documents(data, "test")) == "".join(texts[:60])
    assert 2 < len(documents(data, "test")) < 5
    config = data_config(tmp_path, name="text", path=str(tmp_path / "dict"), validation_path=str(tmp_path / "one"))
    with pytest.raises(UserError, match=r"config\.data\.validation_path=.*has a validation split already"):
        open_(config)


def test_splits_of_their_own(tmp_path):
    for name, text in (("train", POEM), ("val", "held out\n" * 9), ("test", "at the end\n" * 9)):
        (tmp_path / f"{name}.txt").write_text(text)
    fields = dict(name="text", path=str(tmp_path / "train.txt"))
    both = dict(validation_path=str(tmp_path / "val.txt"), test_path=str(tmp_path / "test.txt"))
    data = open_(data_config(tmp_path, **fields, **both))
    assert [documents(data, s) for s in ("train", "validation", "test")] == [
        [POEM],
        ["held out\n" * 9],
        ["at the end\n" * 9],
    ]
    one = open_(data_config(tmp_path, **fields, test_path=both["test_path"]))
    assert one.folder != data.folder
    assert "".join(documents(one, "train") + documents(one, "validation")) == POEM
    assert abs(one["validation"].bytes / len(POEM) - 0.05) < 0.01
    with pytest.raises(UserError, match=r"config\.data\.test_path='/nowhere': matches no file"):
        open_(data_config(tmp_path, **fields, test_path="/nowhere"))
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(UserError, match=r"config\.data\.test_path='.*empty.txt': no text in 1 file"):
        open_(data_config(tmp_path, **fields, test_path=str(tmp_path / "empty.txt")))


def test_documents_are_drawn_by_their_text(tmp_path):
    texts = [f"{i}: a line\n" for i in range(4000)]
    parts = {text: drawn(text, ("validation", "test")) for text in texts}
    for split in ("validation", "test"):
        share = sum(part == split for part in parts.values()) / len(texts)
        assert abs(share - 0.05) < 4 * (0.05 * 0.95 / len(texts)) ** 0.5
    assert {drawn(text, ("test",)) for text in texts} == {"train", "test"}

    for name, piece in (("a", texts[:2000]), ("b", texts[2000:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in piece))
    data = open_(data_config(tmp_path, path=str(tmp_path / "*.jsonl"), held_out="documents"))
    for split in ("train", "validation", "test"):
        assert documents(data, split) == [text for text in texts if parts[text] == split]
    (tmp_path / "few.txt").write_text("one document")
    with pytest.raises(UserError, match=r"no document is drawn for the validation split"):
        open_(data_config(tmp_path, path=str(tmp_path / "few.txt"), held_out="documents"))


def test_a_lone_file_that_is_all_held_out_is_told(tmp_path, capsys):
    for n in range(5):
        (tmp_path / f"{n}.txt").write_text(POEM)
    open_(data_config(tmp_path, path=str(tmp_path / "*.txt")))
    assert "all that is held out is the end of" in (told := capsys.readouterr().err) and "4.txt, the last of 5" in told
    for n in range(5, 40):
        (tmp_path / f"{n}.txt").write_text(POEM)
    open_(data_config(tmp_path, path=str(tmp_path / "*.txt")))
    assert "held out" not in capsys.readouterr().err
