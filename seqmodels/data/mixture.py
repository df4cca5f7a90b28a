"""A weighted mixture of sources: which source a row comes from depends on its position alone.

So a run that is resumed goes on in the same order, and no state is stored. After any number of rows, each source has
had its share of them, to within one row.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from ml_collections import ConfigDict

from seqmodels.data.contract import Batch, BatchSource, Spec, text_spec
from seqmodels.data.dataset import TokenSplit, load_one
from seqmodels.data.sizes import Sizes
from seqmodels.data.sources import EMBEDDED
from seqmodels.data.tokenizer import Tokenizer
from seqmodels.errors import UserError

CYCLE = 1000  # rows after which the order of sources repeats; weights count in thousandths
NAMED = ("hf:", "tfds:")  # beginnings of a source that is no path


def parse(text: str) -> list[tuple[float, str]]:
    """Weights, which add up to 1, and sources of "0.7 books; 0.3 code.jsonl". Raises: UserError."""
    parts = [part.strip().partition(" ") for part in text.split(";") if part.strip()]
    found = []
    for weight, _, source in parts:
        try:
            value = float(weight)
        except ValueError:
            value = -1.0
        if not 0 < value < np.inf or not source.strip():
            raise UserError(f"config.data.mixture={text!r}: must be like '0.7 books; 0.3 code': weights and sources")
        found.append((value, source.strip()))
    if len(found) < 2:
        raise UserError(f"config.data.mixture={text!r}: must have at least two sources")
    total = sum(weight for weight, _ in found)
    shares = [weight / total for weight, _ in found]
    if unread := set(range(len(found))) - set(cycle(shares).tolist()):
        share, (_, source) = shares[min(unread)], found[min(unread)]
        raise UserError(
            f"config.data.mixture={text!r}: must give each source a share of about 1/{CYCLE} or more; {source} has "
            f"{share:.2g} and would never be read"
        )
    return [(share, source) for share, (_, source) in zip(shares, found, strict=True)]


def part_of(config: ConfigDict, source: str) -> ConfigDict:
    """`config.data` of one source: a path, `hf:NAME`, `tfds:NAME` or the embedded text."""
    part = config.copy_and_resolve_references().unlock()
    part.mixture = ""
    if source == EMBEDDED or source.startswith(NAMED):
        part.name, part.path = source.removeprefix("tfds:"), ""
    else:
        part.name, part.path = "text", source
    return part


def cycle(weights: Sequence[float]) -> np.ndarray:
    """[CYCLE] int: the source of each row. The next one is always the one that lags furthest behind its share."""
    shares = np.asarray(weights)
    counts, order = np.zeros(len(shares)), np.empty(CYCLE, np.int64)
    for row in range(CYCLE):
        order[row] = np.argmax(shares * (row + 1) - counts)
        counts[order[row]] += 1
    return order


def joined(splits: Sequence[TokenSplit]) -> TokenSplit:
    """Splits one after another, as one; in memory."""
    lengths = np.concatenate([[0], np.cumsum([len(split.tokens) for split in splits])])
    places = list(zip(splits, lengths[:-1], strict=True))
    sizes = [split.sizes for split in splits]
    return TokenSplit(
        np.concatenate([split.tokens for split in splits]),
        np.concatenate([split.documents + before for split, before in places]),
        sum(split.bytes for split in splits),
        splits[0].separate,
        _joined_sizes(sizes, lengths) if all(size is not None for size in sizes) else None,
    )


def _joined_sizes(sizes: Sequence[Any], lengths: np.ndarray) -> Sizes:
    wide = [size.wide + np.array([[before, 0]]) for size, before in zip(sizes, lengths[:-1], strict=True)]
    return Sizes(np.concatenate([size.sizes for size in sizes]), np.concatenate(wide))


@dataclasses.dataclass(frozen=True)
class Mixture(BatchSource):
    """Rows of several sources, by weight.

    Attributes:
      parts: a dataset with rows one by one (batch_size 1) for each source; row j of the mixture's rows of a source is
        `batch(j)` of it.
      weights: their shares, which add up to 1.
    """

    parts: tuple[Any, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...]
    tokenizer: Tokenizer
    seq_len: int
    batch_size: int

    measured_by: ClassVar[str] = "perplexity"

    @property
    def spec(self) -> Spec:
        """Arrays of a batch: `tokens`, `targets`, `segment_ids` [B, T] int32."""
        return text_spec(self.batch_size, self.seq_len, self.tokenizer.vocab_size)

    @cached_property
    def _order(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The cycle; how many rows of its source come before each row in it [CYCLE]; and rows of each source in it."""
        order = cycle(self.weights)
        ones = order[:, None] == np.arange(len(self.parts))
        return order, (np.cumsum(ones, 0) - ones)[np.arange(CYCLE), order], ones.sum(0)

    def place(self, row: int) -> tuple[int, int]:
        """The source of a row of the mixture, and which of the source's rows it is."""
        order, before, counts = self._order
        rounds, inside = divmod(row, CYCLE)
        source = int(order[inside])
        return source, int(rounds * counts[source] + before[inside])

    def batch(self, n: int, rows: slice | None = None) -> Batch:
        """As `Dataset.batch`."""
        found = []
        for place in np.arange(self.batch_size)[rows or slice(None)]:
            source, number = self.place(n * self.batch_size + int(place))
            found.append(self.parts[source].batch(number))
        return {name: np.concatenate([row[name] for row in found]) for name in found[0]}

    @property
    def held_out(self) -> list[str]:
        """Splits other than train that all sources have."""
        return [split for split in self.parts[0].held_out if all(split in part.held_out for part in self.parts)]

    @cached_property
    def _splits(self) -> dict[str, TokenSplit]:
        return {}

    def __getitem__(self, split: str) -> TokenSplit:
        """A held-out split: those of all sources, one after another."""
        if split not in self.held_out:
            raise UserError(f"split {split!r}: must be one of {', '.join(self.held_out)}")
        if split not in self._splits:
            self._splits[split] = joined([part[split] for part in self.parts])
        return self._splits[split]

    def xz_bits_per_byte(self, split: str) -> float:
        """As of `Dataset`; each source is compressed alone."""
        found = [part.meta["splits"][split] for part in self.parts]
        return 8 * sum(part["xz_bytes"] for part in found) / sum(part["xz_of_bytes"] for part in found)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the tokenizer, and of the splits of each source."""
        found = {"tokenizer": self.tokenizer.fingerprint}
        for number, part in enumerate(self.parts):
            texts = {name: value for name, value in part.fingerprints.items() if name != "tokenizer"}
            found |= {f"{name} of source {number}": value for name, value in texts.items()}
        return found

    def describe(self) -> str:
        """One line that describes the data."""
        parts = ", ".join(f"{weight:.3g} {name}" for weight, name in zip(self.weights, self.names, strict=True))
        return f"tokenizer {self.tokenizer.name}, a mixture of {parts}"


def load(config: ConfigDict, tokenizer: Tokenizer, *, seq_len: int, batch_size: int, seed: int) -> Mixture:
    """The mixture that `config.data.mixture` describes. Raises: UserError, as for each source alone."""
    for name in ("path", "validation_path", "test_path"):
        if config.get(name):
            raise UserError(f"config.data.{name}={config[name]!r}: must be '' with config.data.mixture")
    weights, names = zip(*parse(config.mixture), strict=True)
    parts = [
        load_one(part_of(config, source), tokenizer, seq_len=seq_len, batch_size=1, seed=seed + number)
        for number, source in enumerate(names)
    ]
    return Mixture(tuple(parts), names, weights, tokenizer, seq_len, batch_size)
