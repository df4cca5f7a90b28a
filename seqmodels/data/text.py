"""Plain text: files to documents, and documents to train, validation and test."""

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from seqmodels.data.damage import file_hash
from seqmodels.errors import UserError
from seqmodels.globs import matching

EMBEDDED = Path(__file__).with_name("shakespeare_austen.txt.xz")
ENDINGS = (".txt", ".jsonl")
OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
LARGEST = 2**30  # most bytes of one document; a record of a dataset must be smaller than 2 GiB

# The title page at the beginning of each work: its name, perhaps a year, and the author.
TITLE_PAGE = re.compile(
    r"^(?=([A-Z][^\n]*)\n+(?:\(\d{4}\)\n+)?[Bb]y\s+(?:William Shakespeare|Jane Austen)\b)", re.MULTILINE
)
HELD_OUT = {"NORTHANGER ABBEY": "validation", "MACBETH": "validation", "Persuasion": "test", "THE TEMPEST": "test"}

HELD_OUT_SHARE = 0.05  # of a local text: the last twentieth is the test split, the one before it the validation split


def works() -> Iterator[tuple[str, str, str]]:
    """The embedded corpus: 42 works of Shakespeare and 6 of Austen, in the public domain.

    A document is a whole work. Each held-out split has one whole work of each author, which is left out of training. So
    the model is not trained on any character, plot or sentence of it. The works are Northanger Abbey and Macbeth
    (validation, 5.9% of the bytes), and Persuasion and The Tempest (test, 6.2%).

    Yields:
      (split, title, text)
    """
    text = lzma.decompress(EMBEDDED.read_bytes()).decode("utf-8")
    pages = list(TITLE_PAGE.finditer(text))
    ends = [page.start() for page in pages[1:]] + [len(text)]
    for page, end in zip(pages, ends, strict=True):
        yield HELD_OUT.get(page[1], "train"), page[1], text[page.start() : end].strip() + "\n"


def find_files(pattern: str) -> list[Path]:
    """Files that a glob matches, in sorted order, each of a kind that `read_documents` reads.

    Raises:
      UserError: a file that is none of .txt, .jsonl (or these compressed, .xz or .gz).
    """
    paths = [path for path in matching(pattern) if path.is_file()]
    for path in paths:
        if _ending(path) not in ENDINGS:
            raise UserError(f"config.data.path={pattern!r}: {path} must end in .txt or .jsonl, or these and .xz or .gz")
    return paths


def read_documents(path: Path, text_key: str) -> Iterator[str]:
    """Documents of one file: all of a .txt, each line's `text_key` of a .jsonl. Blank documents are left out.

    Raises:
      UserError: not UTF-8, damaged, too large, a line that is not JSON or lacks the key.
    """
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            if _ending(path) == ".txt":
                content = file.read(LARGEST + 1)
                if len(content) > LARGEST:
                    raise UserError(f"config.data.path: {path} is a document of over 1 GiB: split it, or use .jsonl")
                documents: Iterable[str] = [content.decode("utf-8-sig")]
            else:
                documents = (
                    _json_text(line, f"{path}:{n}", text_key) for n, line in enumerate(file, 1) if line.strip()
                )
            yield from (document for document in documents if document.strip())
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 (byte {error.start}): convert it, for example with iconv"
        raise UserError(f"config.data.path: {path} {reason}") from error
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"config.data.path: {path} is damaged or not {path.suffix[1:]}: {error}") from error
    except OSError as error:
        raise UserError(f"config.data.path: {path} cannot be read ({error.strerror})") from error


def content_hash(path: Path) -> str:
    """Hash of a file's bytes. Raises: UserError where it cannot be read."""
    try:
        return file_hash(path)
    except OSError as error:
        raise UserError(f"config.data.path: {path} cannot be read ({error.strerror})") from error


def read_all(paths: Iterable[Path], text_key: str) -> Iterator[str]:
    """Documents of several files, one after another."""
    for path in paths:
        yield from read_documents(path, text_key)


def _ending(path: Path) -> str:
    return (path.with_suffix("") if path.suffix in OPENERS else path).suffix


def _json_text(line: bytes, where: str, text_key: str) -> str:
    try:
        text = json.loads(line)[text_key]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"config.data.path: {where} is not a JSON object with config.data.text_key={text_key!r}"
        ) from error
    if not isinstance(text, str):
        raise UserError(f"config.data.path: {where} holds no string under config.data.text_key={text_key!r}")
    return text


def cut(documents: Iterable[str], total: int, split: str) -> Iterator[str]:
    """The part of a text that belongs to a split. The splits are contiguous and share no text.

    The last `HELD_OUT_SHARE` of the text is the test split. The part of the same size before it is the validation
    split. A document that crosses a border is cut at the end of a line, or at the end of a word if there is no line
    end. If it is shorter than a hundredth of the text, it stays whole, in the earlier split.

    Args:
      documents: the whole text, document by document.
      total: its length in characters.
      split: train | validation | test.
    """
    borders = {
        "train": (0.0, 1 - 2 * HELD_OUT_SHARE),
        "validation": (1 - 2 * HELD_OUT_SHARE, 1 - HELD_OUT_SHARE),
        "test": (1 - HELD_OUT_SHARE, 1.0),
    }
    first, last = (round(total * share) for share in borders[split])
    start = 0
    for document in documents:
        begin, end = (_cut_at(document, border - start, total) for border in (first, last))
        if document[begin:end].strip():
            yield document[begin:end]
        start += len(document)


def _cut_at(document: str, border: int, total: int) -> int:
    """Where to cut a document if a border lies `border` characters after its beginning."""
    if border <= 0:
        return 0
    if border >= len(document) or len(document) < total / 100:
        return len(document)
    nearest = max(0, border - total // 100)  # do not search further back, so that no split becomes too small
    return document.rfind("\n", nearest, border) + 1 or document.rfind(" ", nearest, border) + 1 or border
