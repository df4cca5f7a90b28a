"""Train short, test long: what methods that need no training do for a trained model on rows longer than in training.

Each method changes fields of `config.model` that have no parameters, so the trained parameters fit. The figure is the
loss of the last tokens of a row as the row grows (Su 2024, kexue.fm/archives/9948): a mean over all positions would
hide a failure at the end. The tokens that count are the same for all lengths and methods.
"""

from typing import TYPE_CHECKING, Any

import flax.linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from seqmodels import pattern
from seqmodels.errors import UserError
from seqmodels.evals.context_lengths import evaluate
from seqmodels.evals.run import Run
from seqmodels.layers.rope_scaling import dynamic_factor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Fields = dict[str, Any]
STEPPED = ("mamba", "mamba2", "mamba3", "h3", "s4", "s4d", "s5")  # branches with a step size dt
SCALINGS = ("linear", "ntk", "yarn", "llama3", "rerope", "leaky_rerope")  # methods that are values of attention.scaling


def changes(method: str, trained: int, length: int, longest: int) -> dict[str, Fields]:
    """Fields that a method sets, for each branch that it concerns.

    Args:
        trained: tokens of a row in training. length: of the row to be read. longest: of the longest row.
    """
    factor = longest / trained  # one for all lengths, as of a model that is put to use; only `dynamic` looks at the row
    if method == "dynamic":
        return {"attention": dict(scaling="ntk", scaling_factor=dynamic_factor(length, trained))}
    if method in SCALINGS:
        return {"attention": dict(scaling=method, scaling_factor=factor, trained_length=trained)}
    if method == "log_n":
        return {"attention": dict(log_n=trained)}
    if method == "window":
        return {"attention": dict(window=trained)}
    if method == "dt":
        return {branch: dict(dt_scale=1 / factor) for branch in STEPPED}
    return {}


def methods_of(config: ConfigDict) -> list[str]:
    """The methods in config.evaluation.extrapolate, in order."""
    return [name.strip() for name in config.evaluation.extrapolate.split(",")]


def check(config: ConfigDict) -> None:
    """Raises UserError for a method that does not fit the model."""
    there = pattern.names(config.model.pattern)
    for method in methods_of(config):
        concerned = changes(method, 2, 4, 4)
        if concerned and not set(concerned) & set(there):
            _refuse(method, f"model.pattern={config.model.pattern!r} has none of {', '.join(concerned)}")
        positions = config.model.attention.positions if "attention" in there else ""
        if method in (*SCALINGS, "dynamic") and positions != "rope":
            _refuse(method, f"it changes rotary positions, and model.attention.positions={positions!r}")


def _refuse(method: str, reason: str) -> None:
    raise UserError(f"config.evaluation.extrapolate={method}: does not fit this model: {reason}")


def changed(model: nn.Module, changes: dict[str, Fields]) -> nn.Module:
    """The model with other fields of its branches, for the same parameters."""
    config = ConfigDict(model.config.to_dict())  # a new one: two that were made from each other compare as equal
    for branch, fields in changes.items():
        if branch in config:
            config[branch].update(fields)
    return model.clone(config=FrozenConfigDict(config))


def evaluate_run(run: Run, splits: list[str], limit: int | None) -> dict:
    """Loss by split, method and length. The last seq_len / 2 tokens of each row count."""
    config = run.config
    lengths = sorted({config.seq_len * n for n in config.evaluation.lengths})
    options: dict[str, Any] = dict(
        lengths=lengths,
        piece=config.seq_len,
        scored=max(config.seq_len // 2, 1),
        batch_size=run.batch_size,
        limit=config.evaluation.rows if limit is None else min(limit, config.evaluation.rows),
        mesh=run.mesh,
    )
    result: dict[str, dict] = {}
    for split in splits:
        result[split] = {}
        for method in methods_of(config):
            known = {n: changed(run.model, changes(method, config.seq_len, n, lengths[-1])) for n in lengths}
            figures = evaluate(known.__getitem__, run.params, run.dataset[split], **options)
            result[split][method] = {
                n: {k: v for k, v in row.items() if k != "by_position"} for n, row in figures.items()
            }
    return {"extrapolation": result}


def table(result: dict) -> str:
    lines = []
    for split, by_method in result["extrapolation"].items():
        lengths = list(next(iter(by_method.values())))
        lines.append(f"{split:<14}" + "".join(f"{n:>12}" for n in lengths) + "   nats a token at the end of so many")
        for method, by_length in by_method.items():
            cells = (f"{row['loss']:>12.4f}" if "loss" in row else f"{'not served':>12}" for row in by_length.values())
            lines.append(f"{method:<14}{''.join(cells)}")
    return "\n".join(lines)


def plot(axes: "Axes", result: dict) -> None:
    """The first split."""
    split, by_method = next(iter(result["extrapolation"].items()))
    for method, by_length in by_method.items():
        served = [(int(n), row["loss"]) for n, row in by_length.items() if "loss" in row]
        if served:
            axes.plot(*zip(*served, strict=True), "o-", label=method)
            axes.legend()
    axes.set(xlabel="tokens of the row", ylabel="nats a token", title=f"loss of the last tokens ({split})")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
