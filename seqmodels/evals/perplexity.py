"""Perplexity and bits per byte of a split."""

import math
from typing import Any

import flax.linen as nn
from jax.sharding import Mesh

from seqmodels.data.dataset import TokenSplit
from seqmodels.evals.run import Run
from seqmodels.evals.scoring import PositionSums, position_sums


def evaluate(
    model: nn.Module,
    params: Any,
    split: TokenSplit,
    *,
    length: int,
    batch_size: int,
    limit: int | None = None,
    mesh: Mesh | None = None,
) -> dict[str, float | int]:
    """Loss of every token of a split, read in order in rows of `length`, each from a zero state.

    Arguments are those of `seqmodels.evals.scoring.position_sums`.

    Returns:
      loss: mean nats of a token. perplexity: its exponential. bits_per_byte: bits for each byte of raw text. tokens,
      bytes: how many were measured.
    """
    options: dict[str, Any] = dict(length=length, batch_size=batch_size, limit=limit, mesh=mesh)
    return figures(position_sums(model, params, split, **options))


def figures(sums: PositionSums) -> dict[str, float | int]:
    """What `evaluate` returns."""
    nats, tokens = float(sums.nats.sum()), int(sums.tokens.sum())
    loss = nats / tokens
    return dict(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # beyond is no float
        bits_per_byte=nats / math.log(2) / sums.bytes,
        tokens=tokens,
        bytes=sums.bytes,
    )


def evaluate_run(run: Run, splits: list[str], limit: int | None) -> dict:
    """Each figure by split, and the bits per byte of `xz -9`: a good model of text needs fewer."""
    by_split = {split: figures(run.position_sums(split, limit)) for split in splits}
    result = {
        name: {split: values[name] for split, values in by_split.items()}
        for name in ("loss", "perplexity", "bits_per_byte", "tokens", "bytes")
    }
    result["xz_bits_per_byte"] = {split: run.dataset.xz_bits_per_byte(split) for split in splits}
    return result


def table(result: dict) -> str:
    lines = [f"{'split':<12}{'perplexity':>12}{'bits/byte':>12}{'xz -9':>12}{'tokens':>14}"]
    for split in result["loss"]:
        lines.append(
            f"{split:<12}{result['perplexity'][split]:>12.4f}{result['bits_per_byte'][split]:>12.4f}"
            f"{result['xz_bits_per_byte'][split]:>12.4f}{result['tokens'][split]:>14,}"
        )
    return "\n".join(lines)
