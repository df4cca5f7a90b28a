"""Answers that a model writes after prompts: up to a stop string, the end of the document, or a number of tokens."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from seqmodels.data.tokenizer import Tokenizer
from seqmodels.generation import Sampling, decode

GREEDY = Sampling(0.0)


def answers(
    model: nn.Module,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    stops: Sequence[list[str]],
    *,
    tokens: int,
    batch_size: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> list[str]:
    """The answer to each prompt, without the stop string at which it ends.

    Args:
      prompts: token ids, at least one each. stops: for each prompt, the strings that end its answer.
      tokens: most tokens of an answer. batch_size: rows at once; prompts of similar length are together.
    """
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for first in range(0, len(order), batch_size):
        rows = np.resize(order[first : first + batch_size], batch_size)  # one shape
        found = _batch(
            model, params, tokenizer, [prompts[i] for i in rows], [stops[i] for i in rows], tokens, sampling, seed
        )
        for i, text in zip(rows, found, strict=True):
            texts[i] = text
    return texts


def _batch(model, params, tokenizer, prompts, stops, tokens, sampling, seed) -> list[str]:
    separator = tokenizer.separator
    texts: list[str] = []

    def enough(out: np.ndarray) -> bool:
        """Updates `texts`; returns whether each of them has ended."""
        texts[:] = [tokenizer.decode(row[: (row != separator).cumprod().sum()]) for row in out]
        found = [any(s in text for s in stop) for text, stop in zip(texts, stops, strict=True)]
        return bool((found | (out == separator).any(axis=1)).all())

    options: dict[str, Any] = dict(sampling=sampling, seed=seed, stop=separator, enough=enough)
    enough(decode(model, params, prompts, tokens=tokens, vocab_size=tokenizer.vocab_size, **options))
    return [
        min((text.split(s)[0] for s in stop), key=len, default=text) for text, stop in zip(texts, stops, strict=True)
    ]
