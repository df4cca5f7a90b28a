"""Files of token ids that other projects made: nanoGPT's `.bin`, and Megatron's `.bin` with an `.idx` beside it.

nanoGPT: uint16 ids, one document after another, each followed by the separator. Megatron
(megatron/core/datasets/indexed_dataset.py): the `.idx` has a header, the number type and the places of documents.

Ids stay as they are: the token cache copies them, or links the file where it is a whole split of the right type.
"""

import dataclasses
import lzma
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from seqmodels.data.damage import file_hash
from seqmodels.data.text import HELD_OUT_SHARE
from seqmodels.data.tokenizer import Tokenizer
from seqmodels.errors import UserError
from seqmodels.globs import matching

ENDING = ".bin"
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, type, sequences, documents + 1
TYPES: dict[int, Any] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CHUNK = 2**24  # ids in memory at once
XZ_BYTES = 2**26  # as in a token cache of text
SPLITS = {"train": "train", "validation": "val", "test": "test"}  # their names in a folder of nanoGPT


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """Attributes:
    tokens: [tokens] integers, mapped from disk.
    starts: [documents] where documents begin, of Megatron's index; None: separators say it.
    """

    path: Path
    tokens: np.ndarray
    starts: np.ndarray | None

    def documents(self, separator: int) -> np.ndarray:
        """[documents] int64: where documents begin. The separator behind a document begins the next one."""
        if self.starts is None:
            found = [np.flatnonzero(self.tokens[at : at + CHUNK] == separator) + at for at in self._chunks()]
            starts = np.concatenate(found) if found else np.zeros(0, np.int64)
        else:
            before = self.tokens[np.maximum(self.starts - 1, 0)] == separator
            starts = self.starts - (before & (self.starts > 0))
            if self.tokens[-1] == separator:
                starts = np.append(starts, len(self.tokens) - 1)
        return np.unique(np.concatenate([[0], starts[starts < len(self.tokens)]])).astype(np.int64)

    def _chunks(self) -> range:
        return range(0, len(self.tokens), CHUNK)


@dataclasses.dataclass(frozen=True)
class TokenRange:
    """The ids of a split: parts (file, first, last + 1) one after another."""

    split: str
    parts: tuple[tuple[TokenFile, int, int], ...]

    @property
    def count(self) -> int:
        """Files, for messages."""
        return len(self.parts)

    def write(self, tokenizer: Tokenizer, folder: Path) -> dict:
        """Writes a split of a token cache into a folder, and returns its part of `meta.json`.

        The bytes of raw text are those of the decoded ids, and are counted only of held-out splits.

        Raises: UserError where an id is not of the tokenizer.
        """
        folder.mkdir(parents=True)
        self._check(tokenizer)
        starts = self._starts(tokenizer.separator)
        (file, first, last), *others = self.parts
        if not others and first == 0 and last == len(file.tokens) and file.tokens.dtype == tokenizer.dtype:
            (folder / "tokens.bin").symlink_to(file.path.absolute())
        else:
            with (folder / "tokens.bin").open("wb") as out:
                for piece in self._pieces():
                    out.write(piece.astype(tokenizer.dtype).tobytes())
        np.save(folder / "documents.npy", starts)
        figures = {"tokens": sum(last - first for _, first, last in self.parts), "documents": len(starts)}
        sizes = dict.fromkeys(("bytes", "xz_bytes", "xz_of_bytes"), 0)
        figures |= sizes if self.split == "train" else self._sizes(tokenizer, starts)
        return figures | {"sha256": file_hash(folder / "tokens.bin")}

    def _pieces(self) -> Iterator[np.ndarray]:
        for file, first, last in self.parts:
            for at in range(first, last, CHUNK):
                yield file.tokens[at : min(at + CHUNK, last)]

    def _check(self, tokenizer: Tokenizer) -> None:
        for piece in self._pieces():
            if piece.size and not 0 <= int(piece.min()) <= int(piece.max()) < tokenizer.vocab_size:
                worst = int(piece.min()) if piece.min() < 0 else int(piece.max())
                raise UserError(
                    f"config.data.tokenizer={tokenizer.name!r}: has ids below {tokenizer.vocab_size}, and "
                    f"{self.parts[0][0].path} holds {worst}; name the tokenizer that made the file"
                )

    def _starts(self, separator: int) -> np.ndarray:
        """Where documents begin. That of a further file begins with the separator that ends the file before."""
        found: list[Any] = [[0]]
        before = 0
        for file, first, last in self.parts:
            starts = file.documents(separator)
            found.append(starts[(starts > first) & (starts < last)] - first + before)
            before += last - first
            if file.tokens[last - 1] != separator:
                found.append([before])
        starts = np.unique(np.concatenate(found)).astype(np.int64)
        return starts[starts < before]

    def _sizes(self, tokenizer: Tokenizer, starts: np.ndarray) -> dict[str, int]:
        """Bytes of the decoded text, and what `xz -9` makes of its first XZ_BYTES."""
        tokens = np.concatenate(list(self._pieces()))
        xz, size, xz_in, xz_out = lzma.LZMACompressor(preset=9), 0, 0, 0
        for ids in np.split(tokens, starts[1:]):
            raw = tokenizer.decode(ids).encode("utf-8")
            head = raw[: XZ_BYTES - xz_in]
            size, xz_in, xz_out = size + len(raw), xz_in + len(head), xz_out + len(xz.compress(head))
        return {"bytes": size, "xz_bytes": xz_out + len(xz.flush()), "xz_of_bytes": xz_in}


def files_of(config: ConfigDict) -> dict[str, list[Path]]:
    """The `.bin` files by split that `config.data` names; none where it names other files.

    A folder with `train.bin` is one of nanoGPT; `val.bin` and `test.bin` in it are the held-out splits.

    Raises: UserError where `.bin` files are mixed with others, or a split has none.
    """
    folder = Path(config.path).expanduser()
    if folder.is_dir() and (folder / f"train{ENDING}").is_file():
        there = {split: folder / f"{name}{ENDING}" for split, name in SPLITS.items()}
        return {split: [path] for split, path in there.items() if path.is_file()}
    files: dict[str, list[Path]] = {}
    for split in SPLITS:
        name = "path" if split == "train" else f"{split}_path"
        parts = [part.strip() for part in config.get(name, "").split(",") if part.strip()]
        binary = [part for part in parts if part.endswith(ENDING)]
        if not binary and (split == "train" or not parts):
            if split == "train":
                return {}
            continue
        if len(binary) < len(parts):
            raise UserError(
                f"config.data.{name}={config[name]!r}: must be {ENDING} files, as those of config.data.path"
            )
        files[split] = [path for part in parts for path in matching(part)]
        if not files[split]:
            raise UserError(f"config.data.{name}={config[name]!r}: matches no file")
    return files


def open_splits(files: dict[str, list[Path]]) -> dict[str, TokenRange]:
    """The ids of each split. Splits without files are cut from the end of train. Raises: UserError, see `open_file`."""
    opened = {split: [open_file(path) for path in paths] for split, paths in files.items()}
    found = {split: TokenRange(split, tuple((f, 0, len(f.tokens)) for f in some)) for split, some in opened.items()}
    missing = [split for split in SPLITS if split not in found]
    for split in reversed(missing):  # the test split is the last part
        total = sum(len(file.tokens) for file in opened["train"])
        found["train"], found[split] = _cut(found["train"], split, int(total * HELD_OUT_SHARE))
    return {split: found[split] for split in SPLITS}


def _cut(whole: TokenRange, split: str, tokens: int) -> tuple[TokenRange, TokenRange]:
    """The last so many tokens of a range as another split, and the rest."""
    rest = list(whole.parts)
    last: list[tuple[TokenFile, int, int]] = []
    while tokens > 0 and rest:
        file, first, stop = rest.pop()
        begin = max(stop - tokens, first)
        last.insert(0, (file, begin, stop))
        tokens -= stop - begin
        if begin > first:
            rest.append((file, first, begin))
    return TokenRange(whole.split, tuple(rest)), TokenRange(split, tuple(last))


def open_file(path: Path) -> TokenFile:
    """A `.bin` file, with its `.idx` if there is one. Raises: UserError where it is not what it should be."""
    index = path.with_suffix(".idx")
    try:
        if index.is_file():
            kind, starts, tokens = _read_index(index)
        else:
            kind, starts, tokens = np.dtype(np.uint16), None, path.stat().st_size // 2
        if path.stat().st_size != tokens * kind.itemsize or not tokens:
            what = f"{index.name} says {tokens} ids of {kind.name}" if starts is not None else "ids of uint16 (nanoGPT)"
            raise UserError(f"config.data.path: {path} has {path.stat().st_size} bytes, which are not {what}")
        return TokenFile(path, np.memmap(path, kind, mode="r"), starts)
    except OSError as error:
        raise UserError(f"config.data.path: {error.filename or path} cannot be read ({error.strerror})") from error


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, int]:
    """Number type, starts of documents and number of ids of Megatron's `.idx`. Raises: UserError, OSError."""
    content = path.read_bytes()
    try:
        magic, version, code, sequences, borders = HEADER.unpack_from(content)
        if magic != MAGIC or version != 1 or code not in TYPES:
            raise ValueError(f"magic {magic!r}, version {version}, type {code}")
        lengths = np.frombuffer(content, "<i4", sequences, HEADER.size)
        pointers = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences)
        first = np.frombuffer(content, "<i8", borders, HEADER.size + 12 * sequences)  # sequence that begins a document
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        kind = np.dtype(TYPES[code])
        if not np.array_equal(pointers, ends[:-1] * kind.itemsize):
            raise ValueError("sequences do not follow one another")
        return kind, ends[first[:-1]], int(ends[-1])
    except (struct.error, ValueError, IndexError) as error:
        raise UserError(f"config.data.path: {path} is not an index of Megatron ({error})") from error


def content(files: dict[str, list[Path]]) -> list:
    """JSON value that identifies the files: their sizes, and 64 MiB of each, evenly spread."""
    import hashlib

    def sampled(path: Path) -> list:
        size, piece, digest = path.stat().st_size, 2**20, hashlib.sha256()
        with open(path, "rb") as file:
            for at in sorted({max(size - piece, 0) * i // 63 for i in range(64)}):
                file.seek(at)
                digest.update(file.read(piece))
        return [size, digest.hexdigest()]

    return [[split, *map(sampled, paths)] for split, paths in files.items()]
