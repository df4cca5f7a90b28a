"""Log-likelihoods of continuations of texts: many short requests in few rows, all of one compiled shape.

Several requests share a row. Each is a document of its own, so it sees no other request. A recurrent model reads a row
in pieces and keeps its state between them, so a request may have any length and cross from one piece into the next.
For a Transformer a row is as long as its context.
"""

import bisect
import heapq
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh

from seqmodels.data.tokenizer import Tokenizer
from seqmodels.errors import UserError
from seqmodels.evals.scoring import rows_of, score_long


class Request(NamedTuple):
    """Tokens [n] int32 from anywhere in a document, of which the last `scored` are to be predicted."""

    tokens: np.ndarray
    scored: int


class Likelihood(NamedTuple):
    """nats: sum of -log p over the scored tokens. greedy: whether each of them is the likeliest at its position."""

    nats: float
    greedy: bool


def continuations(tokenizer: Tokenizer, pairs: list[tuple[str, str]], context: int | None = None) -> list[Request]:
    """Requests for `p(continuation | text)`, each pair a text and what follows it.

    Text and continuation are tokenised as one string, which begins a document. White space at the end of the text is
    moved to the continuation, as in lm-eval: tokenizers put a space into the token of the word that follows. What is
    behind as many tokens as the text alone has is scored. Where a token spans the join, so that nothing is left behind
    them, the text and the continuation are tokenised each by itself, as lm-eval will do
    (github.com/EleutherAI/lm-evaluation-harness/pull/4055). If both are longer than the model's context, the beginning
    is cut off.

    Args:
      tokenizer: as in docs/architecture.md.
      context: tokens that the model can see; None: any number.

    Raises: UserError for a continuation without tokens, or longer than the context.
    """
    split = [(text.rstrip(), text[len(text.rstrip()) :] + continuation) for text, continuation in pairs]
    wholes = tokenizer.encode_batch([text + continuation for text, continuation in split])
    texts = tokenizer.encode_batch([text for text, _ in split])
    spanned = [i for i, (whole, text) in enumerate(zip(wholes, texts, strict=True)) if len(whole) <= len(text)]
    for i, alone in zip(spanned, tokenizer.encode_batch([split[i][1] for i in spanned]), strict=True):
        wholes[i] = np.concatenate([texts[i], alone])
    requests = []
    for whole, text, pair in zip(wholes, texts, pairs, strict=True):
        scored = len(whole) - len(text)
        if scored < 1 or (context is not None and scored > context):
            allowed = "at least one" if scored < 1 else f"at most {context}, the Transformer's context"
            raise UserError(f"continuation {pair[1][:60]!r} has {max(scored, 0)} tokens: must be {allowed}")
        tokens = np.concatenate([[begin(tokenizer)], whole]).astype(np.int32)
        requests.append(Request(tokens if context is None else tokens[-(context + 1) :], scored))
    return requests


def windows(tokenizer: Tokenizer, text: str, context: int | None = None) -> list[Request]:
    """Requests that predict every token of a text once, each from all that the model can see before it.

    A text longer than the context is cut where the context ends. The last window goes back as far as it can.
    """
    tokens = np.concatenate([[begin(tokenizer)], tokenizer.encode(text)]).astype(np.int32)
    step = len(tokens) if context is None else context
    stops = [min(start + step, len(tokens) - 1) for start in range(0, len(tokens) - 1, step)]
    return [Request(tokens[max(stop - step, 0) : stop + 1], (stop - 1) % step + 1) for stop in stops]


def begin(tokenizer: Tokenizer) -> int:
    """The token that begins a document. Raises: UserError where there is none, as in synthetic tasks."""
    if tokenizer.separator < 0:
        raise UserError(f"tokenizer {tokenizer.name}: encodes no text; this evaluator needs a model of text")
    return tokenizer.separator


def score(
    model: nn.Module,
    params: Any,
    requests: list[Request],
    *,
    piece: int,
    batch_size: int,
    context: int | None = None,
    mesh: Mesh | None = None,
) -> list[Likelihood]:
    """The likelihood of each request, in the order of the requests.

    Args:
      model, params: as in docs/architecture.md; params unboxed.
      piece: tokens of a row that a recurrent model reads at once.
      batch_size: rows at once, rounded up to a multiple of the parts that the mesh splits rows into.
      context: tokens that the model can see; None: any number.
    """
    batch_size = rows_of(batch_size, mesh)
    rows = pack([len(request.tokens) - 1 for request in requests], context, batch_size)
    result: dict[int, Likelihood] = {}
    for first in range(0, len(rows), batch_size):
        group = rows[first : first + batch_size]
        used = max(sum(len(requests[i].tokens) - 1 for i in row) for row in group)
        length = -(-used // piece) * piece if context is None else context
        shape = (batch_size, length)
        tokens, targets, ids = (np.zeros(shape, np.int32) for _ in range(3))
        places = {}
        for b, row in enumerate(group):
            stop = 0
            for number, i in enumerate(row, 1):
                start, stop = stop, stop + len(requests[i].tokens) - 1
                tokens[b, start:stop], targets[b, start:stop] = requests[i].tokens[:-1], requests[i].tokens[1:]
                ids[b, start:stop] = number
                places[i] = b, slice(stop - requests[i].scored, stop)
        batch = {"tokens": tokens, "targets": targets, "segment_ids": ids}  # the rest of a row is one more document
        nats, best = score_long(model, params, batch, piece if context is None else context, mesh)
        for i, place in places.items():
            result[i] = Likelihood(float(nats[place].sum()), bool((best[place] == targets[place]).all()))
    return [result[i] for i in range(len(requests))]


def pack(lengths: list[int], capacity: int | None, rows: int) -> list[list[int]]:
    """Shares requests among rows: a list of numbers of requests for each row. Long requests are placed first.

    Args:
      lengths: tokens of each request.
      capacity: tokens that fit into a row, at least those of the longest request. Each request goes into the fullest
        row that has room for it (best fit). None: any number; there are `rows` rows, and each request goes into the
        row that is shortest so far.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if capacity is None:
        packed: list[list[int]] = [[] for _ in range(rows)]
        shortest = [(0, row) for row in range(rows)]
        for i in order:
            used, row = shortest[0]
            packed[row].append(i)
            heapq.heapreplace(shortest, (used + lengths[i], row))
        return packed
    packed = []
    free: list[tuple[int, int]] = []  # (room, row), least room first
    for i in order:
        fullest = bisect.bisect_left(free, (lengths[i],))
        room, row = free.pop(fullest) if fullest < len(free) else (capacity, len(packed))
        if row == len(packed):
            packed.append([])
        packed[row].append(i)
        bisect.insort(free, (room - lengths[i], row))
    return packed
