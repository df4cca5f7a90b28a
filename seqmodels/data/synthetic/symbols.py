"""The tokenizer of a task. Every id has a name, and a text is a sequence of names separated by spaces."""

import difflib
from collections.abc import Iterable

import numpy as np

from seqmodels.data.tokenizer import Tokenizer
from seqmodels.errors import UserError


class SymbolTokenizer(Tokenizer):
    """Maps names to ids and back. Rows are not documents, so there is no separator."""

    name = "symbols"
    separator = -1

    def __init__(self, symbols: list[str]) -> None:
        self.fingerprint = " ".join(symbols)
        self.vocab_size = len(symbols)
        self._symbols = symbols
        self._ids = {symbol: i for i, symbol in enumerate(symbols)}

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Raises UserError for an unknown name."""
        for word in (word for text in texts for word in text.split() if word not in self._ids):
            near = difflib.get_close_matches(word, self._symbols, n=3, cutoff=0) if len(word) < 20 else []
            raise UserError(f"{word!r} is no symbol of this task; there are {', '.join(near)} and the like")
        return [np.array([self._ids[word] for word in text.split()], self.dtype) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self._symbols[i] for i in map(int, ids) if i < self.vocab_size)
