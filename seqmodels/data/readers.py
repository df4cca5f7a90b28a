"""Files to documents: text, JSON, CSV and tables of Arrow, by the ending of their names."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from seqmodels.data.damage import file_hash
from seqmodels.errors import UserError
from seqmodels.globs import matching

LARGEST = 2**30  # most bytes of one document; a record of a dataset must be smaller than 2 GiB
ROWS = 1000  # rows of a table that are read at once
KEYS_SHOWN = 8  # in a message about a key that is not there

Reader = Callable[[IO[bytes], Path, str], Iterable[str]]


def zstd(path: Path, mode: str) -> IO[bytes]:
    """An opened .zst file; Python has no module for it before 3.14."""
    import pyarrow

    if mode != "rb":
        raise ValueError(f"mode is {mode!r}; allowed: 'rb'")
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))  # type: ignore[type-var, return-value]


OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open, ".zst": zstd}


def whole(file: IO[bytes], path: Path, text_key: str) -> Iterator[str]:
    """The file is one document."""
    content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise UserError(f"config.data.path: {path} is a document of over 1 GiB: split it, or use .jsonl")
    yield content.decode("utf-8-sig")


def json_lines(file: IO[bytes], path: Path, text_key: str) -> Iterator[str]:
    """Each line is an object with a document."""
    for n, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"config.data.path: {path}:{n} is not JSON ({error})") from error
            yield text_of(row, f"{path}:{n}", text_key)


def json_array(file: IO[bytes], path: Path, text_key: str) -> Iterator[str]:
    """An array of objects or of texts; some files with this ending hold lines instead."""
    content = file.read()
    try:
        rows = json.loads(content)
    except ValueError as error:
        if len(lines := content.strip().splitlines()) > 1 and lines[0].strip().endswith(b"}"):
            yield from json_lines(io.BytesIO(content), path, text_key)
            return
        raise UserError(f"config.data.path: {path} is not JSON ({error})") from error
    rows = [rows] if isinstance(rows, dict) else rows
    if not isinstance(rows, list):
        raise UserError(f"config.data.path: {path} is neither a JSON array nor an object")
    for n, row in enumerate(rows):
        yield row if isinstance(row, str) else text_of(row, f"{path}, item {n}", text_key)


def separated(delimiter: str) -> Reader:
    """A reader of rows of cells, with the names of the columns in the first row (RFC 4180)."""

    def read(file: IO[bytes], path: Path, text_key: str) -> Iterator[str]:
        csv.field_size_limit(LARGEST)
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        try:
            for n, row in enumerate(csv.DictReader(lines, delimiter=delimiter), 1):
                yield text_of(row, f"{path}, row {n}", text_key)
        except csv.Error as error:
            raise UserError(f"config.data.path: {path} is not a table of cells ({error})") from error
        finally:
            if not file.closed:  # as it is where somebody read the first rows only
                lines.detach()  # the caller closes the file

    return read


def parquet(file: IO[bytes], path: Path, text_key: str) -> Iterator[str]:
    """A Parquet table: one document a row."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        _check_column(table.schema_arrow.names, path, text_key)
        batches = table.iter_batches(ROWS, columns=[text_key])
        yield from _column(batches, path, text_key)
    except pyarrow.ArrowException as error:
        raise UserError(f"config.data.path: {path} is damaged or not Parquet: {_first_line(error)}") from error


def arrow(file: IO[bytes], path: Path, text_key: str) -> Iterator[str]:
    """A table of Arrow, as a stream (`datasets.save_to_disk`) or a file (Feather 2): one document a row."""
    import pyarrow

    try:
        magic = file.read(6)
        file.seek(0)
        if magic == b"ARROW1":
            table = pyarrow.ipc.open_file(file)
            batches: Iterable[Any] = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            batches = table = pyarrow.ipc.open_stream(file)
        _check_column(table.schema.names, path, text_key)
        yield from _column((batch.select([text_key]) for batch in batches), path, text_key)
    except pyarrow.ArrowException as error:
        raise UserError(f"config.data.path: {path} is damaged or not Arrow: {_first_line(error)}") from error


READERS: dict[str, Reader] = {
    ".txt": whole,
    ".md": whole,
    ".jsonl": json_lines,
    ".json": json_array,
    ".csv": separated(","),
    ".tsv": separated("\t"),
    ".parquet": parquet,
    ".arrow": arrow,
}


def find_files(pattern: str, field: str = "path") -> list[Path]:
    """The files that a path names, in sorted order within each of its parts.

    Args:
      pattern: files, globs and folders, apart by commas. Of a folder all files count whose kind is known, and of a
        folder that `datasets.save_to_disk` wrote those of its table.
      field: of config.data, for messages.

    Raises:
      UserError: a glob matches a file of an unknown kind, or a part of a list matches nothing.
    """
    what = f"config.data.{field}={pattern!r}"
    parts = [pattern] if matching(pattern) else [part.strip() for part in pattern.split(",")]
    found: list[Path] = []
    for part in parts:
        paths = matching(part)
        if not paths and len(parts) > 1:
            raise UserError(f"{what}: {part!r} matches no file")
        for path in paths:
            found += _of_folder(path, what) if path.is_dir() and len(paths) == 1 else [path] * path.is_file()
    for path in found:
        if ending(path) not in READERS:
            raise UserError(f"{what}: {path} must end in {_listed(READERS)}, or these and {_listed(OPENERS)}")
    return found


def saved_splits(path: str) -> dict[str, Path]:
    """The folders by split, where `path` is a folder of a DatasetDict that `save_to_disk` wrote. Else none."""
    listing = Path(path).expanduser() / "dataset_dict.json"
    try:
        names = json.loads(listing.read_text())["splits"] if listing.is_file() else []
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"config.data.path: {listing} cannot be read ({error})") from error
    return {name: listing.parent / name for name in names}


def _of_folder(folder: Path, what: str) -> list[Path]:
    """Files of known kinds in a folder and the folders in it, without hidden ones. `what`: field and value."""
    state = folder / "state.json"
    if state.is_file() and (folder / "dataset_info.json").is_file():  # a table of save_to_disk
        return [folder / entry["filename"] for entry in json.loads(state.read_text())["_data_files"]]
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ending(path) in READERS)
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not files:
        raise UserError(f"{what}: {folder} has no file that ends in {_listed(READERS)}")
    return files


def read_documents(path: Path, text_key: str) -> Iterator[str]:
    """Documents of one file: all of a text, or the `text_key` of each row. Blank documents are left out.

    Raises:
      UserError: not UTF-8, damaged, too large, or a row that lacks the key.
    """
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            documents = READERS[ending(path)](file, path, text_key)
            yield from (document for document in documents if document.strip())
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 (byte {error.start}): convert it, for example with iconv"
        raise UserError(f"config.data.path: {path} {reason}") from error
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"config.data.path: {path} is damaged or not {path.suffix[1:]}: {error}") from error
    except OSError as error:
        reason = error.strerror or _first_line(error)
        raise UserError(f"config.data.path: {path} cannot be read ({reason})") from error


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


def ending(path: Path) -> str:
    """Ending of a file's name, without that of its compression."""
    return (path.with_suffix("") if path.suffix in OPENERS else path).suffix


def text_of(row: Any, where: str, text_key: str) -> str:
    """The document of a row. Raises: UserError, which names the keys that are there."""
    if not isinstance(row, dict):
        raise UserError(f"config.data.path: {where} is not an object with the key config.data.text_key={text_key!r}")
    if text_key not in row:
        raise UserError(f"config.data.text_key={text_key!r}: {where} has {_keys(row)}")
    if not isinstance(row[text_key], str):
        raise UserError(f"config.data.path: {where} holds no string under config.data.text_key={text_key!r}")
    return row[text_key]


def _check_column(names: list[str], path: Path, text_key: str) -> None:
    if text_key not in names:
        raise UserError(f"config.data.text_key={text_key!r}: {path} has {_keys(names)}")


def _column(batches: Iterable[Any], path: Path, text_key: str) -> Iterator[str]:
    """The texts of a column; a row without one has a blank text."""
    for batch in batches:
        for value in batch.column(0).to_pylist():
            if value is not None and not isinstance(value, str):
                raise UserError(f"config.data.path: {path} holds no strings under config.data.text_key={text_key!r}")
            yield value or ""


def _listed(endings: Iterable[str]) -> str:
    *first, last = endings
    return f"{', '.join(first)} or {last}"


def _keys(names: Iterable[Any]) -> str:
    """The keys that are there, for a message."""
    names = [str(name) for name in names]
    more = ", ..." if len(names) > KEYS_SHOWN else ""
    return f"the keys {', '.join(names[:KEYS_SHOWN])}{more}" if names else "no keys"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
