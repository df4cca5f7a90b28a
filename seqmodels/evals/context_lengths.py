"""Context lengths beyond the one in training: the same tokens, with more and more text before them.

A row is read in pieces of the trained length. Each piece starts from the state after the piece before. So a recurrent
model needs no more memory for 64 times its context than for its context. The cache of a Transformer grows with it.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh

from seqmodels.data.dataset import TokenSplit
from seqmodels.evals.by_position import by_position
from seqmodels.evals.memory import served
from seqmodels.evals.run import Run
from seqmodels.evals.scoring import PositionSums, rows_of, score_long

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def evaluate(
    model: nn.Module | Callable[[int], nn.Module],
    params: Any,
    split: TokenSplit,
    *,
    lengths: list[int],
    piece: int,
    scored: int,
    batch_size: int,
    limit: int,
    mesh: Mesh | None = None,
) -> dict[str, dict]:
    """Loss of the same tokens after contexts of different lengths.

    The split is cut into rows of the longest length. For every length the model reads the last `length` tokens of each
    row from a zero state, and its loss on the last `scored` tokens counts. If `limit` leaves some rows out, the others
    are spread evenly over the split.

    Args:
      model: the same for all lengths, or a function of the length.
      lengths: context lengths in tokens, multiples of `piece`.
      piece: tokens of a row that are read at once.
      scored: targets in each row that count; at most the shortest length.
      batch_size: rows at once.
      limit: the most rows.

    Returns:
      For each length, as a decimal string: {"loss": nats a token, "perplexity", "tokens", "by_position"}, or
      {"not_served": reason}. "by_position" is the loss of all tokens that were read, by their position in the row.
    """
    longest = max((n for n in lengths if split.rows(n)), default=0)
    available = split.rows(longest) if longest else 0
    count = min(limit, available)
    ends = (np.arange(count) * available // max(count, 1) + 1) * longest  # of the row in the split
    batch_size = rows_of(min(batch_size, max(count, 1)), mesh)
    result = {}
    for length in lengths:
        if length > longest:
            result[str(length)] = {
                "not_served": f"the split has {len(split.tokens):,} tokens, a row needs {length + 1:,}"
            }
            continue
        if 0 < (last := learned_positions(model)) < length:
            result[str(length)] = {"not_served": f"the model has learned only {last:,} positions"}
            continue
        known = model if isinstance(model, nn.Module) else model(length)
        result[str(length)] = served(
            functools.partial(_figures, known, params, split, ends, length, piece, batch_size, mesh, scored)
        )
    return result


def learned_positions(model: nn.Module | Callable[[int], nn.Module]) -> int:
    """Positions that a model with learned ones has; 0: any number."""
    config: Any = getattr(model, "config", {})
    return config["position_table"] if config.get("positions") == "learned" else 0


def _figures(model, params, split, ends, length, piece, batch_size, mesh, scored: int) -> dict:
    """Figures of the rows of `length` tokens before each of the ends; the last `scored` tokens of a row count."""
    nats, rows = _sums_of_nats(model, params, split, ends, length, piece, batch_size, mesh), len(ends)
    loss = float(nats[len(nats) - scored :].sum()) / (rows * scored)
    return dict(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        tokens=rows * scored,
        by_position=by_position(PositionSums(nats, np.full(len(nats), rows), 0)),
    )


def _sums_of_nats(model, params, split, ends, length, piece, batch_size, mesh) -> np.ndarray:
    """[length] float64: nats of the `length` tokens before each of the ends, summed over the ends."""
    total = np.zeros(length)
    for first in range(0, len(ends), batch_size):
        stops = ends[first : first + batch_size]
        filled = np.resize(stops, batch_size)  # rows are repeated to keep one shape; the repeats do not count
        text = np.stack([split.tokens[end - length : end + 1] for end in filled]).astype(np.int32)
        segment_ids = np.stack([split.segment_ids(end - length, end) for end in filled])
        batch = {"tokens": text[:, :-1], "targets": text[:, 1:], "segment_ids": segment_ids}
        total += score_long(model, params, batch, piece, mesh)[0][: len(stops)].sum(axis=0)
    return total


def evaluate_run(run: Run, splits: list[str], limit: int | None) -> dict:
    """Figures at config.evaluation.lengths times seq_len. The last seq_len / 2 tokens of each row count."""
    config = run.config
    return {
        "context_lengths": {
            split: evaluate(
                run.model,
                run.params,
                run.dataset[split],
                lengths=sorted({config.seq_len * n for n in config.evaluation.lengths}),
                piece=config.seq_len,
                scored=max(config.seq_len // 2, 1),
                batch_size=run.batch_size,
                limit=config.evaluation.rows if limit is None else min(limit, config.evaluation.rows),
                mesh=run.mesh,
            )
            for split in splits
        }
    }


def table(result: dict) -> str:
    by_split = result["context_lengths"]
    lines = [f"{'context':<12}" + "".join(f"{split:>12}" for split in by_split) + "   nats a token"]
    for length in next(iter(by_split.values()), {}):
        cells, reasons = "", set()
        for values in by_split.values():
            cells += f"{values[length]['loss']:>12.4f}" if "loss" in values[length] else f"{'not served':>12}"
            reasons |= {values[length]["not_served"]} if "not_served" in values[length] else set()
        lines.append(f"{length:<12}{cells}" + (f"   {'; '.join(sorted(reasons))}" if reasons else ""))
    return "\n".join(lines)


def plot(axes: "Axes", result: dict) -> None:
    for split, by_length in result["context_lengths"].items():
        served = [(int(length), values["loss"]) for length, values in by_length.items() if "loss" in values]
        if served:
            axes.plot(*zip(*served, strict=True), "o-", label=split)
            axes.legend()
    axes.set(xlabel="context (tokens)", ylabel="nats a token", title="the same tokens, longer context")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")


def plot_positions(axes: "Axes", result: dict) -> None:
    """Loss by position in the longest context that is served."""
    for split, by_length in result["context_lengths"].items():
        served = {int(length): values for length, values in by_length.items() if "loss" in values}
        if served:
            positions = served[max(served)]["by_position"]
            middle = np.sqrt((np.array(positions["first"]) + 1) * (np.array(positions["last"]) + 1))
            axes.plot(middle, positions["loss"], "o-", label=f"{split}, {max(served):,} tokens")
            axes.legend()
    axes.set(xscale="log", xlabel="position in the context, from 1", ylabel="nats a token", title="the longest context")


PLOTS = (plot, plot_positions)
