"""A passkey in a haystack: does a model still know, at the end of a long text, a number that was said in it once?

A run of the passkey task is measured on rows of the task. A run of text is measured on the same sentences in plain
English (Mohtashami and Jaggi 2023), in the tokens of the run. A key is found if greedy decoding would say it: each of
its tokens is the likeliest one after those before it.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh

from seqmodels.backbone import context
from seqmodels.data.tokenizer import Tokenizer
from seqmodels.errors import UserError
from seqmodels.evals.accuracy import PIECE, read_rows
from seqmodels.evals.run import Run, RunData
from seqmodels.evals.scoring import rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEPTHS = tuple(i / 10 for i in range(11))  # share of the filler before the needle
TRIES = 10  # keys for each depth and length

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


def serves(run: RunData) -> bool:
    """Whether a run has what this evaluator measures."""
    by = run.dataset.measured_by
    return by == "perplexity" or (by == "accuracy" and run.dataset.task.has_depth)


def text_row(tokenizer: Tokenizer, key: int, depth: float, length: int) -> tuple[np.ndarray, int]:
    """A row of text in tokens.

    Args:
      tokenizer: as in docs/architecture.md.
      depth: share of the filler before the needle.
      length: of the row with the key, in tokens.

    Returns: [length + 1] int32, which begins with the separator and ends with the key; number of tokens of the key.
    Raises: UserError if introduction, needle and question are already longer than that.
    """
    encode = tokenizer.encode
    needle, end = encode(NEEDLE.format(key=key)), encode(f"{QUESTION} {key}")
    answer = len(end) - len(encode(QUESTION))
    start = [tokenizer.separator, *encode(INTRODUCTION)]
    room = length + 1 - len(start) - len(needle) - len(end)
    if room < 0:
        raise UserError(f"a needle and the question for it take {length - room:,} tokens")
    before = round(depth * room)
    hay = encode(HAY)
    sentences = [np.resize(hay, size) for size in (before, room - before)]
    return np.concatenate([start, sentences[0], needle, sentences[1], end]).astype(np.int32), answer


def text_rows(
    tokenizer: Tokenizer, rng: np.random.Generator, depth: float, count: int, length: int
) -> dict[str, np.ndarray]:
    """`count` rows of text at a depth, as a `SyntheticSplit` yields them."""
    batch = {name: np.zeros((count, length), np.int32) for name in ("tokens", "targets", "segment_ids")}
    for row in range(count):
        text, answer = text_row(tokenizer, int(rng.integers(1, 50_001)), depth, length)
        batch["tokens"][row] = text[:-1]
        batch["targets"][row] = np.where(np.arange(length) >= length - answer, text[1:], -1)
    return batch


def evaluate(
    model: nn.Module,
    params: Any,
    rows: Callable[..., Any],
    *,
    lengths: list[int],
    tries: int,
    batch_size: int,
    piece: int,
    most: int | None,
    mesh: Mesh | None = None,
) -> dict[str, dict]:
    """How many keys are found at each length and depth.

    Args:
      rows: (depth, length, count) -> tokens, targets, segment_ids [count, length]; raises UserError if it cannot.
      lengths: of the rows, in tokens. tries: keys for each cell.
      piece: tokens of a row read at once.
      most: tokens that the model can see; None is any number.

    Returns:
      For each length, as a decimal string: {"accuracy": [share of keys found at each of DEPTHS]}, or
      {"not_served": reason}.
    """
    size, result = rows_of(batch_size, mesh), {}
    for length in lengths:
        if most is not None and length > most:
            result[str(length)] = {"not_served": f"the model sees {most:,} tokens"}
            continue
        try:
            parts = [rows(depth, length, tries) for depth in DEPTHS]
            whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            found = []
            for start in range(0, len(DEPTHS) * tries, size):
                places = np.arange(start, start + size) % (
                    len(DEPTHS) * tries
                )  # repeats keep one shape, and do not count
                batch = {name: part[places] for name, part in whole.items()}
                _, right = read_rows(model, params, batch, piece=min(piece, length), mesh=mesh)
                found.append((right | (batch["targets"] < 0)).all(axis=1))
        except UserError as error:
            result[str(length)] = {"not_served": str(error)}
            continue
        shares = np.concatenate(found)[: len(DEPTHS) * tries].reshape(len(DEPTHS), tries)
        result[str(length)] = {"accuracy": shares.mean(axis=1).tolist()}
    return result


def evaluate_run(run: Run, splits: list[str], limit: int | None) -> dict:
    """The heat map of a run: at the task's lengths, or at `config.evaluation.lengths` times that of training."""
    config, dataset = run.config, run.dataset
    if dataset.measured_by == "accuracy":
        lengths = sorted({config.seq_len, *dataset.lengths})

        def rows(depth, length, count):
            split = dataset.other("test", dataclasses.replace(dataset.task, depth=depth))
            (batch,) = split.windows(length, count, count)
            return batch

        most = None if context(config) is None else max(config.seq_len, PIECE * 8)
    else:
        lengths = sorted({config.seq_len * n for n in config.evaluation.lengths})

        def rows(depth, length, count):
            return text_rows(dataset.tokenizer, np.random.default_rng([config.seed, length]), depth, count, length)

        most = context(config)
    result = evaluate(
        run.model,
        run.params,
        rows,
        lengths=lengths,
        tries=TRIES if limit is None else min(limit, TRIES),
        batch_size=run.batch_size,
        piece=min(config.seq_len, PIECE),
        most=most,
        mesh=run.mesh,
    )
    return {"needle": result, "needle_depths": list(DEPTHS)}


def table(result: dict) -> str:
    by_length = result["needle"]
    lines = [f"{'passkey':<12}" + "".join(f"{depth:>7.0%}" for depth in result["needle_depths"]) + "   depth"]
    for length, values in by_length.items():
        cells = "".join(f"{share:>7.2f}" for share in values.get("accuracy", []))
        lines.append(f"{length:<12}" + (cells or f"   {values['not_served']}"))
    return "\n".join(lines)


def plot(axes: "Axes", result: dict) -> None:
    served = {length: values["accuracy"] for length, values in result["needle"].items() if "accuracy" in values}
    axes.set(xlabel="tokens of the row", ylabel="depth of the passkey", title="passkeys found")
    if not served:
        return
    image = axes.imshow(np.array(list(served.values())).T, vmin=0, vmax=1, aspect="auto", cmap="RdYlGn")
    axes.set_xticks(range(len(served)), list(served), rotation=45)
    axes.set_yticks(range(len(DEPTHS)), [f"{depth:.0%}" for depth in result["needle_depths"]])
    axes.figure.colorbar(image, ax=axes, label="share")
