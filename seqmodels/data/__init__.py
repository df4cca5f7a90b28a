"""Text to batches: sources, tokenizers, the token cache and the batches drawn from it. See docs/data.md."""

from seqmodels.data.dataset import Dataset, TokenSplit, load, prefetch
from seqmodels.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Dataset", "TokenSplit", "Tokenizer", "load", "load_tokenizer", "prefetch"]
