"""Loss by position in the context: does the model use what it has read?"""

import itertools
from typing import TYPE_CHECKING

import numpy as np

from seqmodels.evals.run import Run
from seqmodels.evals.scoring import PositionSums

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def buckets(length: int) -> list[tuple[int, int]]:
    """The positions 0, 1, 2-3, 4-7, ... below `length`, as pairs (first, last + 1)."""
    edges = [0, *(1 << bit for bit in range(length.bit_length()) if 1 << bit < length), length]
    return list(itertools.pairwise(edges))


def by_position(sums: PositionSums) -> dict[str, list]:
    """Mean loss of each bucket.

    Returns:
      first, last: positions (tokens read before this one in the row), both included. loss: nats a token.
    """
    result: dict[str, list] = {"first": [], "last": [], "loss": []}
    for first, end in buckets(len(sums.nats)):
        if tokens := int(sums.tokens[first:end].sum()):
            result["first"].append(first)
            result["last"].append(end - 1)
            result["loss"].append(float(sums.nats[first:end].sum()) / tokens)
    return result


def evaluate_run(run: Run, splits: list[str], limit: int | None) -> dict:
    return {"loss_by_position": {split: by_position(run.position_sums(split, limit)) for split in splits}}


def table(result: dict) -> str:
    by_split = result["loss_by_position"]
    lines = [f"{'position':<12}" + "".join(f"{split:>12}" for split in by_split) + "   nats a token"]
    spans = max((list(zip(v["first"], v["last"], strict=True)) for v in by_split.values()), key=len, default=[])
    for row, (first, last) in enumerate(spans):
        name = str(first) if first == last else f"{first}-{last}"
        cells = [f"{v['loss'][row]:>12.4f}" if row < len(v["loss"]) else " " * 12 for v in by_split.values()]
        lines.append(f"{name:<12}" + "".join(cells))
    return "\n".join(lines)


def plot(axes: "Axes", result: dict) -> None:
    for split, values in result["loss_by_position"].items():
        middle = np.sqrt((np.array(values["first"]) + 1) * (np.array(values["last"]) + 1))
        axes.plot(middle, values["loss"], "o-", label=split)
    axes.set(xscale="log", xlabel="position in the context, from 1", ylabel="nats a token", title="loss by position")
    axes.legend()
