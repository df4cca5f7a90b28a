"""The token cache: text that was tokenised once, in flat files that NumPy maps into memory.

The folder `<cache>/tokens/<label>-<request>-<text>/`, where request and text are fingerprints, contains
- `<split>/tokens.bin`: ids of all documents one after another, each preceded by the separator; uint16 or uint32;
- `<split>/documents.npy`: int64, index in `tokens.bin` at which each document begins;
- `<split>/sizes.bin`, `<split>/wide.npy`: bytes of raw text of each token (`seqmodels.data.sizes`);
- `meta.json`: tokenizer, dtype and, by split, tokens, documents, bytes and hash of the text and its size under `xz -9`.

The folder is written under another name and renamed at the end, so a cache is always complete. Other processes wait for
a lock; where a host does not see the locks of another, both build one, and the first that is complete stays. In a job
of several processes the first one builds it (`seqmodels.job`).
"""

import array
import contextlib
import glob
import hashlib
import json
import lzma
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from seqmodels.claim import waited
from seqmodels.data import damage
from seqmodels.data.sizes import SizeWriter
from seqmodels.data.sources import Documents, Source, fingerprint
from seqmodels.data.token_files import TokenRange
from seqmodels.data.tokenizer import Tokenizer
from seqmodels.errors import UserError

FORMAT = 2  # increases when the format of the files changes
BEFORE = 1  # caches of this format have no sizes and no hashes; they serve where a new one cannot be made
BATCH_CHARACTERS = 2**20  # tokenised at once
HOST = socket.gethostname().partition(".")[0]
UNTOUCHED = 86_400  # seconds after which a folder that another host began counts as left behind
XZ_BYTES = 2**26  # the xz figure is measured on the first 64 MiB of a split: the dictionary size of xz -9


def find_or_build(source: Source, tokenizer: Tokenizer, root: Path) -> Path:
    """Directory of the finished cache for a source and a tokenizer, built if there is none.

    Args:
      source: the text. It is opened only if there is no cache.
      tokenizer: the tokenizer of the text.
      root: `config.data.cache`.

    Raises:
      UserError: no text, or a cache that cannot be written.
    """
    folder = root.expanduser() / "tokens"
    stem = f"{source.label}-{fingerprint([source.key, tokenizer.fingerprint, FORMAT])}"
    if found := _find(folder, stem, source.content):
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with waited(folder / f".{stem}.lock"):
            return _find(folder, stem, source.content) or _build(source, tokenizer, folder, stem)
    except OSError as error:
        mistake = UserError(f"config.data.cache={str(root)!r}: cannot be written ({error.strerror or error})")
    except UserError as error:
        mistake = error
    if old := _find_old(source, tokenizer, folder):
        return old
    raise mistake


def _find_old(source: Source, tokenizer: Tokenizer, folder: Path) -> Path | None:
    """A cache of the format before this one, as the version that wrote it would have found it."""
    key, content = source.before
    found = _find(folder, f"{source.label}-{fingerprint([key, tokenizer.fingerprint, BEFORE])}", content)
    if found:
        text = "its text cannot be read now, so bits per byte of a part of a split are estimates"
        print(f"{found}: a token cache of an earlier version; {text}", file=sys.stderr, flush=True)
    return found


def _find(folder: Path, stem: str, content: str | None) -> Path | None:
    """The newest finished cache of a request. If the fingerprint of the text is known, only a cache of that text."""
    found = folder.glob(f"{glob.escape(stem)}-{content or '*'}/meta.json")
    return max((path.parent for path in found if not path.parent.name.endswith(".partial")), key=_age, default=None)


def _age(path: Path) -> float:
    return (path / "meta.json").stat().st_mtime


def _build(source: Source, tokenizer: Tokenizer, folder: Path, stem: str) -> Path:
    content, splits = source.open()
    target = folder / f"{stem}-{content}"
    _remove_left(folder, stem)
    partial = target.with_name(f"{target.name}.{HOST}.{os.getpid()}.partial")
    meta: dict[str, Any] = {
        "source": source.key,
        "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "dtype": tokenizer.dtype.name,
        "splits": {},
    }
    for split, documents in splits.items():
        if isinstance(documents, TokenRange):
            meta["splits"][split] = documents.write(tokenizer, partial / split)
        else:
            meta["splits"][split] = _write_split(documents, tokenizer, partial / split)
        if not meta["splits"][split]["tokens"] > 1:
            shutil.rmtree(partial)
            raise UserError(
                f"config.data.name={source.key['name']!r}: no text in the {documents.count} document(s) of its {split} "
                "split. Splits that a dataset lacks are cut from its end, so it may be too small"
            )
        meta["splits"][split]["files"] = damage.checksums(partial / split)
    (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    if (target / "meta.json").exists():  # by another host, whose lock is not seen here
        shutil.rmtree(partial)
        return target
    if target.exists():  # it would have been found
        print(f"{target}: a token cache without its meta.json; it is made anew", file=sys.stderr, flush=True)
        shutil.rmtree(target)
    os.rename(partial, target)
    return target


def _remove_left(folder: Path, stem: str) -> None:
    """Removes what builders that were killed have left: of this host, or not touched for a day."""
    for path in folder.glob(f"{glob.escape(stem)}-*.partial"):
        *_, host, process, _ = ["", "", *path.name.split(".")]
        here = host == HOST and process.isdecimal()
        with contextlib.suppress(FileNotFoundError):  # its builder has just ended
            newest = max(file.stat().st_mtime for file in (path, *path.rglob("*")))
            if (here and not _runs(int(process))) or time.time() - newest > UNTOUCHED:
                shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _write_split(documents: Documents, tokenizer: Tokenizer, folder: Path) -> dict:
    """Tokenise one split into a folder, and return its part of `meta.json`."""
    folder.mkdir(parents=True)
    starts, tokens, size = array.array("q"), 0, 0
    xz, xz_in, xz_out = lzma.LZMACompressor(preset=9), 0, 0
    content = hashlib.sha256()
    with (
        (folder / "tokens.bin").open("wb") as file,
        SizeWriter(folder) as size_writer,
        tqdm(total=documents.count, desc=f"tokenizing {documents.split}", unit=" documents", disable=None) as bar,
    ):
        for texts in _batches(documents):
            for text, (ids, sizes) in zip(texts, tokenizer.encode_with_sizes(texts), strict=True):
                starts.append(tokens)
                file.write(np.concatenate([[tokenizer.separator], ids]).astype(tokenizer.dtype).tobytes())
                tokens += 1 + len(ids)
                raw = text.encode("utf-8")
                size_writer.write(sizes, len(raw))
                content.update(len(raw).to_bytes(8, "little") + raw)  # the length marks where documents end
                head = raw[: XZ_BYTES - xz_in]
                size, xz_in, xz_out = size + len(raw), xz_in + len(head), xz_out + len(xz.compress(head))
            bar.update(len(texts))
    xz_out += len(xz.flush())
    np.save(folder / "documents.npy", np.frombuffer(starts, np.int64) if starts else np.zeros(0, np.int64))
    figures = {"tokens": tokens, "documents": len(starts), "bytes": size, "xz_bytes": xz_out, "xz_of_bytes": xz_in}
    return figures | {"sha256": content.hexdigest()}


def _batches(documents: Documents) -> Iterator[list[str]]:
    """Documents in lists of about BATCH_CHARACTERS characters. Blank documents are left out."""
    filled = (text for text in documents if text.strip())
    while first := next(filled, None):
        batch, room = [first], BATCH_CHARACTERS - len(first)
        while room > 0 and (text := next(filled, None)):
            batch.append(text)
            room -= len(text)
        yield batch


def read_meta(folder: Path) -> dict:
    """`meta.json` of a finished cache, checked against the files beside it.

    Raises:
      UserError: files are damaged or missing.
    """
    try:
        return damage.check(folder)
    except damage.DamageError as error:
        raise UserError(f"config.data.cache: {folder} is damaged: delete it, and it is made anew ({error})") from error
