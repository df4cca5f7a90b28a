"""A text of local files: which documents each split has."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from seqmodels.cloud import is_cloud
from seqmodels.data.readers import content_hash, find_files, read_all, saved_splits
from seqmodels.data.text import HELD_OUT_SHARE, cut
from seqmodels.errors import UserError

SPLITS = ("train", "validation", "test")
LENGTH = 8  # bytes of a hash that decide on the split of a document


@dataclasses.dataclass(frozen=True)
class LocalText:
    """Documents of files. Splits that have no files are held out of train.

    Attributes:
      files: files by split; those of train are always there.
      fields: how a message names the files of a split, such as "config.data.path='books'".
      text_key: key of the text in rows of JSON, CSV and tables.
      held_out: "end": of the text of train, see `seqmodels.data.text.cut`. "documents": see `drawn`.
    """

    files: Mapping[str, list[Path]]
    fields: Mapping[str, str]
    text_key: str
    held_out: str = "end"

    @property
    def missing(self) -> tuple[str, ...]:
        """Splits without files of their own."""
        return tuple(split for split in SPLITS if split not in self.files)

    @functools.cached_property
    def total(self) -> int:
        """Characters of the files of train."""
        return sum(map(len, read_all(self.files["train"], self.text_key)))

    def documents(self, split: str) -> Iterator[str]:
        """Documents of a split, in the order of the files. Raises: UserError for a file that cannot be read."""
        if split != "train" and split in self.files:
            return read_all(self.files[split], self.text_key)
        documents = read_all(self.files["train"], self.text_key)
        if not self.missing:
            return documents
        if self.held_out == "documents":
            return (document for document in documents if drawn(document, self.missing) == split)
        return cut(documents, self.total, split, self.missing)

    def check(self) -> None:
        """Raises a UserError if a split has no text."""
        if not self.total:
            raise UserError(f"{self.fields['train']}: no text in {len(self.files['train'])} file(s)")
        for split in SPLITS:
            if any(self.documents(split)):
                continue
            if split in self.files and split != "train":
                raise UserError(f"{self.fields[split]}: no text in {len(self.files[split])} file(s)")
            what = f"{self.total} characters are too few to cut a {split} split"
            if self.held_out == "documents":
                what = f"no document is drawn for the {split} split; config.data.held_out='end' cuts one"
            raise UserError(f"{self.fields['train']}: {what}")

    def warning(self) -> str:
        """A line if one of several files is all that is held out, which may differ from the others. Else ""."""
        *others, last = self.files["train"]
        if not others or not self.missing or self.held_out != "end":
            return ""
        if sum(map(len, read_all([last], self.text_key))) < len(self.missing) * HELD_OUT_SHARE * self.total:
            return ""
        return (
            f"config.data.path: all that is held out is the end of {last}, the last of {len(others) + 1} files; "
            "config.data.held_out=documents draws documents of all files"
        )


def drawn(document: str, missing: tuple[str, ...]) -> str:
    """The split of a document, which depends on its text alone.

    So equal documents are in one split, and a document stays in its split when others are added. Each split of
    `missing` gets about `HELD_OUT_SHARE` of the documents, and train the others.
    """
    digest = hashlib.sha256(document.encode("utf-8", errors="surrogatepass")).digest()[:LENGTH]
    place = int.from_bytes(digest, "big") / 2 ** (8 * LENGTH) / HELD_OUT_SHARE
    return missing[int(place)] if place < len(missing) else "train"


def local_text(config: ConfigDict) -> LocalText:
    """The text that `config.data` with name=text means. No file has to be there; see `key`.

    Raises:
      UserError: a path is empty or names a file of an unknown kind, or both a folder and a field give a split.
    """
    if not config.path:
        raise UserError(
            "config.data.path='': config.data.name='text' needs files, a glob or a folder, such as 'books/*.txt'"
        )
    saved = saved_splits(config.path)
    if saved and "train" not in saved:
        raise UserError(f"config.data.path={config.path!r}: has no train split, only {', '.join(saved)}")
    files, fields = {}, {}
    for split in SPLITS:
        name = "path" if split == "train" else f"{split}_path"
        given = config.get(name, "")
        if split in saved:
            if given and split != "train":
                raise UserError(f"config.data.{name}={given!r}: config.data.path has a {split} split already")
            given = str(saved[split])
        if given:
            files[split], fields[split] = find_files(given, name), f"config.data.{name}={given!r}"
            if not files[split] and files["train"]:  # without any files a finished cache may serve
                raise UserError(f"{fields[split]}: matches no file")
    return LocalText(files, fields, config.text_key, config.get("held_out", "end"))


def key(config: ConfigDict) -> dict:
    """JSON value that identifies the request. Fields at their defaults, which came later, are left out."""
    value = {"name": "text", "path": place(config.path, Path(config.cache)), "text_key": config.text_key}
    value["held_out"] = HELD_OUT_SHARE
    for name in ("validation_path", "test_path"):
        if config.get(name, ""):
            value[name] = place(config[name], Path(config.cache))
    return value if config.get("held_out", "end") == "end" else value | {"drawn": config.held_out}


def content(text: LocalText) -> list:
    """JSON value that identifies the contents of the files, which are read for it."""
    hashes = {split: [content_hash(file) for file in files] for split, files in text.files.items()}
    return hashes["train"] if len(hashes) == 1 else [hashes]


def place(path: str, cache: Path) -> str:
    """A path as it identifies a text in a cache: absolute, or from the cache's folder.

    So two folders that share a cache do not share texts of the same name, and a folder can be moved with its cache.
    """
    if is_cloud(path):
        return path
    found = Path(path).expanduser()
    return str(found) if found.is_absolute() else os.path.relpath(found, cache.expanduser())
