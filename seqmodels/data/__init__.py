"""Makes batches of text or of synthetic tasks.

Text: sources, tokenizers, the token cache and its batches (docs/data.md). Tasks are generated (docs/synthetic.md)."""

from seqmodels.data.contract import ArraySpec, BatchSource
from seqmodels.data.dataset import Dataset, TokenSplit, load, load_unread, prefetch
from seqmodels.data.synthetic import SyntheticDataset
from seqmodels.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "ArraySpec", "BatchSource", "Dataset", "SyntheticDataset", "TokenSplit", "Tokenizer", "load", "load_tokenizer",
    "load_unread", "prefetch",
]  # fmt: skip
