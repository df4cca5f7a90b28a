"""Batches from a token cache: a batch is a pure function of (seed, step), on any number of hosts."""

import dataclasses
import queue
import threading
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from ml_collections import ConfigDict

from seqmodels.data import cache, domains, synthetic
from seqmodels.data.contract import Batch, BatchSource, Spec, spread, text_spec
from seqmodels.data.permutation import permute
from seqmodels.data.sizes import Sizes
from seqmodels.data.sources import find_source
from seqmodels.data.tokenizer import Tokenizer, load_tokenizer
from seqmodels.errors import UserError

DOCUMENTS = 2**30  # numbers of documents begin anew there: a batch has them as int32, and adds as many under bptt


def numbered(documents: np.ndarray) -> np.ndarray:
    """Numbers of documents as int32. Those of neighbours differ, and more is not asked of them."""
    return (documents % DOCUMENTS).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class TokenSplit:
    """Tokens of one split, in the order of the text.

    Attributes:
      tokens: [tokens] uint16 or uint32, mapped from disk. Every document begins with the separator.
      documents: [documents] int64, index into `tokens` at which each document begins.
      bytes: UTF-8 bytes of the raw text, without separators.
      separate: whether each document has its own segment id (`config.data.reset`). Else all segment ids are 0.
      sizes: bytes of raw text of each token; None in a token cache of an earlier version.
    """

    tokens: np.ndarray
    documents: np.ndarray
    bytes: int
    separate: bool = True
    sizes: Sizes | None = None

    def bytes_of(self, length: int, limit: int | None = None) -> int:
        """Bytes of raw text of the targets of `windows` with these arguments; without `sizes` an estimate."""
        targets = len(self.tokens) - 1
        starts = spread(self.row_count(length), limit) * length
        stops = np.minimum(starts + length, targets)
        read = int(np.sum(stops - starts))
        if read == targets:
            return self.bytes
        if self.sizes is None:
            return round(self.bytes * read / targets)
        return sum(self.sizes.between(int(a) + 1, int(b) + 1) for a, b in zip(starts, stops, strict=True))

    def rows(self, length: int) -> int:
        """Number of whole rows. Row r is `tokens[r * length : (r + 1) * length + 1]`; the last one is only a target."""
        return (len(self.tokens) - 1) // length

    def row_count(self, length: int) -> int:
        """Number of rows of `windows`, the last of which may not be whole."""
        return -(-(len(self.tokens) - 1) // length)

    def segment_ids(self, start: int, stop: int) -> np.ndarray:
        """[stop - start] int32: index in the split of each token's document (see `numbered`), or 0."""
        if not self.separate:
            return np.zeros(stop - start, np.int32)
        return numbered(np.searchsorted(self.documents, np.arange(start, stop), side="right") - 1)

    def read(self, rows: np.ndarray, length: int) -> Batch:
        """Read whole rows: `tokens`, `targets`, `segment_ids`, each [len(rows), length] int32."""
        starts = [int(row) * length for row in rows]
        text = np.stack([self.tokens[s : s + length + 1] for s in starts]).astype(np.int32)
        segment_ids = np.stack([self.segment_ids(s, s + length) for s in starts])
        return {"tokens": text[:, :-1], "targets": text[:, 1:], "segment_ids": segment_ids}

    def windows(self, length: int, batch_size: int = 1, limit: int | None = None) -> Iterator[Batch]:
        """Yields rows for an evaluation, in order. Every token of the split but the first is a target exactly once.

        Args:
          length: context length T, in tokens.
          batch_size: rows at a time, B. The last batch is filled up with masked rows, so every batch has one shape.
          limit: the most rows, those of `contract.spread`; None reads the whole split.

        Yields:
          `tokens`, `targets`, `segment_ids` [B, T] int32 and `mask` [B, T] bool, False where there is no target:
          after the end of the split (where tokens and targets are 0, and the segment id stays) and in added rows.
        """
        targets = len(self.tokens) - 1
        rows = spread(self.row_count(length), limit).tolist()
        for first in range(0, len(rows), batch_size):
            batch = {k: np.zeros((batch_size, length), np.int32) for k in ("tokens", "targets", "segment_ids")}
            batch["mask"] = np.zeros((batch_size, length), bool)
            for b, row in enumerate(rows[first : first + batch_size]):
                start, stop = row * length, min((row + 1) * length, targets)
                n = stop - start
                batch["tokens"][b, :n] = self.tokens[start:stop]
                batch["targets"][b, :n] = self.tokens[start + 1 : stop + 1]
                batch["segment_ids"][b, :n] = self.segment_ids(start, stop)
                batch["segment_ids"][b, n:] = batch["segment_ids"][b, n - 1]
                batch["mask"][b, :n] = True
            yield batch


@dataclasses.dataclass(frozen=True)
class Dataset(BatchSource):
    """A tokenised dataset, and the training batches drawn from it. Made by `load`.

    Attributes:
      folder: folder of its token cache.
      tokenizer: tokenizer of the text.
      seq_len, batch_size: T and B of a (global) batch.
      seed: seed of the order of rows.
      bptt: whether the rows of a batch continue those of the previous batch.
      separate: see `TokenSplit`.
    """

    folder: Path
    tokenizer: Tokenizer
    seq_len: int
    batch_size: int
    seed: int
    bptt: bool
    separate: bool

    measured_by: ClassVar[str] = "perplexity"

    @property
    def spec(self) -> Spec:
        """Arrays of a batch: `tokens`, `targets`, `segment_ids` [B, T] int32."""
        return text_spec(self.batch_size, self.seq_len, self.tokenizer.vocab_size)

    @cached_property
    def meta(self) -> dict:
        """`meta.json` of the cache."""
        return cache.read_meta(self.folder)

    @cached_property
    def _splits(self) -> dict[str, TokenSplit]:
        return {split: self._open(split) for split in self.meta["splits"]}

    def _open(self, split: str) -> TokenSplit:
        tokens = np.memmap(self.folder / split / "tokens.bin", self.meta["dtype"], mode="r")
        documents = np.load(self.folder / split / "documents.npy", mmap_mode="r")
        sizes = Sizes.read(self.folder / split)
        return TokenSplit(tokens, documents, self.meta["splits"][split]["bytes"], self.separate, sizes)

    def __getitem__(self, split: str) -> TokenSplit:
        """A split: train, validation or test."""
        if split not in self._splits:
            raise UserError(f"split {split!r}: must be one of {', '.join(self._splits)}")
        return self._splits[split]

    def describe(self) -> str:
        """One line that describes the data."""
        return (
            f"tokenizer {self.tokenizer.name}, {len(self['train'].tokens):,} training tokens, "
            f"{self.steps_per_epoch:.1f} steps an epoch"
        )

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the tokenizer and of each split's text. A cache of an earlier version has none of its text."""
        parts = self.meta["splits"].items()
        return {"tokenizer": self.tokenizer.fingerprint} | {s: part["sha256"] for s, part in parts if "sha256" in part}

    @property
    def held_out(self) -> list[str]:
        """Splits other than train."""
        return [split for split in ("validation", "test") if split in self.meta["splits"]]

    def xz_bits_per_byte(self, split: str) -> float:
        """Bits per byte that `xz -9` needs for the split's raw text (for its first 64 MiB, if it is longer)."""
        part = self.meta["splits"][split]
        return 8 * part["xz_bytes"] / part["xz_of_bytes"]

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every row of the training split is read once."""
        rows = self["train"].rows(self.seq_len)
        return rows // self.batch_size if self.bptt else rows / self.batch_size

    def batch(self, n: int, rows: slice | None = None) -> Batch:
        """Training batch of step n. It depends only on n and the dataset, not on the host or earlier calls.

        Every epoch reads each row exactly once, in a new random order. With `bptt` the split is B contiguous streams
        instead: row b of batch n + 1 continues row b of batch n. When the streams start again, all segment ids change,
        so that the carried state is reset.

        Args:
          n: step, from 0.
          rows: part of the batch that this host needs; None is all of it.

        Returns:
          `tokens`, `targets`, `segment_ids`: [B, T] int32, or as many rows as `rows` has.
        """
        train = self["train"]
        available = train.rows(self.seq_len)
        places = np.arange(self.batch_size, dtype=np.int64)[rows or slice(None)]
        if self.bptt:
            stream = available // self.batch_size
            batch = train.read(places * stream + n % stream, self.seq_len)
            batch["segment_ids"] += (n // stream) % 2 * min(len(train.documents), DOCUMENTS)
            return batch
        samples = n * self.batch_size + places
        return train.read(permute(samples % available, available, self.seed, samples // available), self.seq_len)


def load(config: ConfigDict, *, seq_len: int, batch_size: int, seed: int = 0, bptt: bool = False) -> Any:
    """The dataset that a config names: text, tokenised on first use, streamed or mixed; or generated (`config.task`).

    With a `config.domain` they are images, series and the like.

    Args:
      config: `config.data`, see seqmodels/fields/run.py.
      seq_len: tokens per row.
      batch_size: rows per step, over all hosts.
      seed: seed of the order of rows.
      bptt: contiguous streams in place of shuffled rows (truncated backpropagation through time).

    Returns: a Dataset, Stream, Mixture or SyntheticDataset.
    Raises:
      UserError: a name, path, tokenizer or size cannot be used; the message says which and why.
    """
    if seq_len < 1:
        raise UserError(f"config.seq_len={seq_len}: must be at least 1")
    if batch_size < 1:
        raise UserError(f"config.batch_size={batch_size}: must be at least 1")
    sizes: dict[str, Any] = dict(seq_len=seq_len, batch_size=batch_size, seed=seed)
    if "task" in config:
        return synthetic.load(config, **sizes, bptt=bptt)
    if "domain" in config:
        return domains.load(config, **sizes, bptt=bptt)
    tokenizer = load_tokenizer(config.tokenizer, config.get("separator", ""))
    for field in ("mixture", "streaming"):
        if bptt and config.get(field):
            raise UserError(f"config.training.bptt=True: must be False with config.data.{field}")
    if config.get("mixture"):
        from seqmodels.data import mixture  # which imports this module

        return mixture.load(config, tokenizer, **sizes)
    return load_one(config, tokenizer, **sizes, bptt=bptt)


def load_one(
    config: ConfigDict, tokenizer: Tokenizer, *, seq_len: int, batch_size: int, seed: int, bptt: bool = False
) -> Any:
    """As `load`, of one text: a Dataset, or a Stream."""
    if config.get("streaming"):
        from seqmodels.data import stream  # which imports this module

        return stream.load(config, tokenizer, seq_len=seq_len, batch_size=batch_size, seed=seed)
    folder = cache.find_or_build(find_source(config), tokenizer, Path(config.cache))
    dataset = Dataset(folder, tokenizer, seq_len, batch_size, seed, bptt, config.reset)
    tokens = len(dataset["train"].tokens)
    if dataset["train"].rows(seq_len) < 1:
        raise UserError(f"config.seq_len={seq_len}: the train split has {tokens} tokens, a row needs {seq_len + 1}")
    if bptt and dataset["train"].rows(seq_len) < batch_size:
        raise UserError(
            f"config.batch_size={batch_size}: with config.training.bptt the train split's {tokens} tokens "
            f"must hold a row of {seq_len} tokens for each of the {batch_size} streams"
        )
    return dataset


@dataclasses.dataclass(frozen=True)
class Unread(BatchSource):
    """Text of which only the tokenizer is there: for a model that reads prompts or is converted. See `Dataset`."""

    tokenizer: Tokenizer
    seq_len: int
    batch_size: int

    @property
    def spec(self) -> Spec:
        """As of `Dataset`."""
        return text_spec(self.batch_size, self.seq_len, self.tokenizer.vocab_size)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hash of the tokenizer."""
        return {"tokenizer": self.tokenizer.fingerprint}


def load_unread(
    config: ConfigDict, *, seq_len: int, batch_size: int, seed: int = 0
) -> Unread | synthetic.SyntheticDataset | domains.DomainDataset:
    """As `load`, but no text is read or tokenised, and none needs to be there. A domain is read, but not drawn."""
    if "task" in config:
        return synthetic.load(config, seq_len=seq_len, batch_size=batch_size, seed=seed)
    if "domain" in config:
        return domains.load(config, seq_len=seq_len, batch_size=batch_size, seed=seed, unread=True)
    return Unread(load_tokenizer(config.tokenizer, config.get("separator", "")), seq_len, batch_size)


class prefetch:
    """Iterator over `dataset.batch(start)`, `dataset.batch(start + 1)`, ..., which a thread reads a few steps ahead.

    Close it, or use it in a `with` statement: the thread has ended when `close` returns. `next` raises errors of the
    thread.

    Args:
      dataset: anything with `batch(n, rows)`.
      start: first step.
      rows: see `Dataset.batch`.
      depth: how many batches are kept ready.
    """

    def __init__(self, dataset: BatchSource, start: int, rows: slice | None = None, depth: int = 2) -> None:
        self._queue: queue.Queue[Batch | Exception] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(dataset, start, rows), name="prefetch", daemon=True)
        self._thread.start()

    def _read(self, dataset, n, rows):
        while not self._closed.is_set():
            try:
                item = dataset.batch(n, rows)
            except Exception as error:
                item = error
            self._put(item)
            if isinstance(item, Exception):
                return
            n += 1

    def _put(self, item):
        """Wait for room in the queue, at most until `close`."""
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                pass

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._closed.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, Exception):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """End the thread. This may be called several times."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
