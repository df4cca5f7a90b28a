"""Text that is read and tokenised while a model trains on it: no copy of it is kept on the disk.

Documents are shuffled in blocks: `config.data.shuffle_buffer` of them are read, and used in a random order. The tokens
of all blocks and epochs, one after another, are cut into rows. So a batch is a pure function of its number, as with a
token cache. Where each block begins is noted in a file, so a run that is resumed reads on from the last block, and does
not tokenise what comes before.
"""

import dataclasses
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ml_collections import ConfigDict

from seqmodels.data import cache, hub, local, token_files
from seqmodels.data.contract import Batch, BatchSource, Spec, text_spec
from seqmodels.data.permutation import permute
from seqmodels.data.sources import Documents, Source, fingerprint
from seqmodels.data.tokenizer import Tokenizer
from seqmodels.errors import UserError

TOGETHER = 64  # documents that are tokenised at once
EPOCH = 2**40  # blocks of an epoch are fewer


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a block begins: in the stream of tokens and documents, and in the text of its epoch."""

    tokens: int
    documents: int
    epoch: int
    block: int


class Stream(BatchSource):
    """Rows of a text that is read from its beginning to its end, again and again.

    Args:
      read: gives the documents of the text from the one of a number on; blank ones count, and are left out.
      held: dataset of the held-out splits, if there are any.
      buffer: documents of a block.
      separate: see `TokenSplit`.
      places: file of the beginnings of blocks; it belongs to this text, tokenizer, buffer and seed.
      content: fingerprint of the text; "": not known.
    """

    measured_by: ClassVar[str] = "perplexity"

    def __init__(
        self, read: Callable[[int], Iterator[str]], tokenizer: Tokenizer, held: Any, *, seq_len: int, batch_size: int,
        seed: int, buffer: int, separate: bool, places: Path, content: str = "",
    ) -> None:  # fmt: skip
        self.tokenizer, self.seq_len, self.batch_size = tokenizer, seq_len, batch_size
        self._read, self._held, self._seed, self._buffer = read, held, seed, buffer
        self._separate, self._file, self._content = separate, places, content
        self._lock = threading.Lock()
        self._seek(0)

    @property
    def spec(self) -> Spec:
        """Arrays of a batch: `tokens`, `targets`, `segment_ids` [B, T] int32."""
        return text_spec(self.batch_size, self.seq_len, self.tokenizer.vocab_size)

    def batch(self, n: int, rows: slice | None = None) -> Batch:
        """As `Dataset.batch`. After the step before it is fast; else it reads on from the last noted block."""
        length = self.seq_len
        first, count = n * self.batch_size * length, self.batch_size * length + 1
        with self._lock:
            tokens, segments = self._between(first, first + count)
        shape = (self.batch_size, length)
        batch = {"tokens": tokens[:-1], "targets": tokens[1:], "segment_ids": segments[:-1]}
        return {name: array.reshape(shape)[rows or slice(None)].astype(np.int32) for name, array in batch.items()}

    def _between(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and segment ids of a piece of the stream, each [last - first]."""
        best = max((place for place in self._places.values() if place.tokens <= first), key=lambda place: place.tokens)
        if first < self._at or best.tokens > self._at + len(self._tokens):
            self._seek(first)
        while self._at + len(self._tokens) < last:
            self._extend(first)
        place = slice(first - self._at, last - self._at)
        return self._tokens[place], self._segments[place]

    def _seek(self, first: int) -> None:
        """Begins to read at the last noted block that begins before this token."""
        start = max((place for place in self._places.values() if place.tokens <= first), key=lambda place: place.tokens)
        self._at = start.tokens
        self._tokens, self._segments = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._next, self._documents = start, start.documents
        self._texts = self._read(start.block * self._buffer)
        self._waiting: list[str] = []  # of the block that is being tokenised

    def _extend(self, first: int) -> None:
        """Reads on by a few documents, and forgets tokens before `first`."""
        if not self._waiting:
            self._next_block()
        texts, self._waiting = self._waiting[:TOGETHER], self._waiting[TOGETHER:]
        tokens, segments = [self._tokens], [self._segments]
        for ids in self.tokenizer.encode_batch(texts):
            number = self._documents % 2**30 if self._separate else 0
            tokens += [np.array([self.tokenizer.separator]), ids]
            segments.append(np.full(1 + len(ids), number))
            self._documents += 1
        self._tokens, self._segments = np.concatenate(tokens), np.concatenate(segments)
        gone = min(max(first - self._at, 0), len(self._tokens))
        self._tokens, self._segments, self._at = self._tokens[gone:], self._segments[gone:], self._at + gone

    def _next_block(self) -> None:
        here = dataclasses.replace(self._next, tokens=self._at + len(self._tokens), documents=self._documents)
        block = list(itertools.islice(self._texts, self._buffer))
        if not block:  # the end of the text
            begin = self._places.get((here.epoch, 0))  # None: a crash has cut its line
            if begin and here.tokens == begin.tokens:
                raise UserError("config.data.streaming=True: the text has no documents")
            here = dataclasses.replace(here, epoch=here.epoch + 1, block=0)
            self._texts = self._read(0)
            block = list(itertools.islice(self._texts, self._buffer))
        self._note(here)
        filled = [text for text in block if text.strip()]
        if filled:
            order = permute(np.arange(len(filled)), len(filled), self._seed, here.epoch * EPOCH + here.block)
            self._waiting = [filled[i] for i in order]
        self._next = dataclasses.replace(here, block=here.block + 1)

    @cached_property
    def _places(self) -> dict[tuple[int, int], Place]:
        """Known beginnings of blocks. Lines that a crash cut short are left out."""
        found = {(0, 0): Place(0, 0, 0, 0)}
        try:
            lines = self._file.read_text().splitlines()
        except OSError:
            lines = []
        for line in lines:
            try:
                place = Place(*map(int, json.loads(line)))
            except (ValueError, TypeError):
                continue
            found[place.epoch, place.block] = place
        return found

    def _note(self, place: Place) -> None:
        if (place.epoch, place.block) in self._places:
            return
        self._places[place.epoch, place.block] = place
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._file, "a") as file:
            file.write(json.dumps(dataclasses.astuple(place)) + "\n")

    @property
    def held_out(self) -> list[str]:
        """Splits other than train."""
        return self._held.held_out if self._held else []

    @property
    def meta(self) -> dict:
        """`meta.json` of the cache of the held-out splits."""
        return self._held.meta

    def __getitem__(self, split: str) -> Any:
        """A held-out split."""
        if split not in self.held_out:
            raise UserError(f"split {split!r}: must be one of {', '.join(self.held_out)}; train is streamed")
        return self._held[split]

    def xz_bits_per_byte(self, split: str) -> float:
        """As of `Dataset`."""
        return self._held.xz_bits_per_byte(split)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the tokenizer, the held-out splits and, where it is known, the text."""
        known = self._held.fingerprints if self._held else {"tokenizer": self.tokenizer.fingerprint}
        return known | ({"train": self._content} if self._content else {})

    def describe(self) -> str:
        """One line that describes the data."""
        return f"tokenizer {self.tokenizer.name}, streamed, shuffled in blocks of {self._buffer:,} documents"


def load(config: ConfigDict, tokenizer: Tokenizer, *, seq_len: int, batch_size: int, seed: int) -> Stream:
    """The stream of a text that `config.data` names: local files, or a data set of the Hugging Face Hub.

    Its held-out splits are in a token cache. Of a data set of the Hub they are its own; what it lacks is not evaluated.

    Raises: UserError for another kind of text, or one that cannot be read.
    """
    from seqmodels.data.dataset import Dataset  # which imports this module

    if config.name.startswith(hub.PREFIX):
        source, read = _of_hub(config)
    elif config.path and not token_files.files_of(config):
        source, read = _of_files(config)
    else:
        raise UserError(
            "config.data.streaming=True: is for text files (config.data.path) and names of the Hub (hf:NAME)"
        )
    held = None
    if source.splits:
        folder = cache.find_or_build(source.held, tokenizer, Path(config.cache))
        held = Dataset(folder, tokenizer, seq_len, batch_size, seed, False, config.reset)
    identity = [source.held.key, source.held.content, tokenizer.fingerprint, config.shuffle_buffer, seed]
    places = Path(config.cache).expanduser() / "streams" / f"{fingerprint(identity)}.jsonl"
    return Stream(
        read, tokenizer, held, seq_len=seq_len, batch_size=batch_size, seed=seed, buffer=config.shuffle_buffer,
        separate=config.reset, places=places, content=source.held.content or "",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Held:
    """The held-out splits of a stream: their names, and the source of their token cache."""

    splits: tuple[str, ...]
    held: Source


def _of_files(config: ConfigDict) -> tuple[Held, Callable[[int], Iterator[str]]]:
    text = local.local_text(config)
    key = local.key(config) | {"streamed": True}
    # without files a finished cache of the held-out splits serves an evaluation
    content = fingerprint(local.content(text)) if any(text.files.values()) else None

    def open_held() -> tuple[str, dict[str, Documents]]:
        if content is None:
            raise UserError(f"config.data.path={config.path!r}: matches no file")
        text.check()
        texts = {split: list(text.documents(split)) for split in local.SPLITS[1:]}
        return content, {split: Documents(split, len(some), some.__getitem__) for split, some in texts.items()}

    held = Held(local.SPLITS[1:], Source("stream", key, content, open_held, (key, content)))
    return held, lambda first: itertools.islice(text.documents("train"), first, None)


def _of_hub(config: ConfigDict) -> tuple[Held, Callable[[int], Iterator[str]]]:
    table = hub.open_table(config, Path(config.cache).expanduser(), streaming=True)
    splits = tuple(split for split in local.SPLITS[1:] if split in table)
    key = {"name": config.name, "text_key": config.text_key, "streamed": True}

    def open_held() -> tuple[str, dict[str, Documents]]:
        texts = {split: list(hub.texts(table[split], config.text_key)) for split in splits}
        found = {split: Documents(split, len(some), some.__getitem__) for split, some in texts.items()}
        return fingerprint([key, {split: some.count for split, some in found.items()}]), found

    held = Held(splits, Source("stream", key, None, open_held, (key, None)))
    return held, lambda first: hub.texts(table["train"].skip(first), config.text_key)
