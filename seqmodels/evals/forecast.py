"""Forecasts of a model of the next value: it reads a window, then its predictions (`seqmodels.forecasting`).

Beside its errors stand those of the dataset's simple forecasts, which are computed now.
"""

from typing import Any

import numpy as np

from seqmodels.data.domains.electricity import Electricity
from seqmodels.evals.run import Run, RunData
from seqmodels.forecasting import feed_back


def serves(run: RunData) -> bool:
    """Whether rows are windows with what follows them, which a model of the next value can be asked for."""
    domain = getattr(run.dataset, "domain", None)
    return isinstance(domain, Electricity) and domain.form == "recurrent"


def evaluate_run(run: Run, splits: list[str], limit: int | None) -> dict:
    """Mean squared and mean absolute error by split and method, over all windows and the steps after each."""
    found: dict[str, dict] = {}
    for split in splits:
        found[split] = {"fed back": errors(run, split, limit)}
        if limit is None and split != "train":
            found[split] |= run.dataset.domain.forecasts(run.dataset.splits, split)
    return {"forecast": found}


def errors(run: Run, split: str, limit: int | None) -> dict[str, float]:
    """Errors of the model on a split; missing values and rows that do not count are left out."""
    lookback, total = run.dataset.domain.lookback, np.zeros(3)
    for batch in run.dataset[split].batches(run.batch_size, limit):
        values, observed = batch["values"], batch.get("observed")
        past = None if observed is None else observed[:, :lookback]
        steps = values.shape[1] - lookback
        guess = np.asarray(feed_back(run.model, run.params, values[:, :lookback], steps, past))
        counts = np.broadcast_to(batch["mask"][:, lookback:, None], guess.shape)
        counts = counts if observed is None else counts & observed[:, lookback:]
        error = (guess - values[:, lookback:])[counts].astype(np.float64)
        total += (error**2).sum(), np.abs(error).sum(), counts.sum()
    return {"mse": float(total[0] / total[2]), "mae": float(total[1] / total[2])}


def table(result: dict) -> str:
    lines = [f"{'split':<12}{'':<20}{'mse':>12}{'mae':>12}"]
    for split, methods in result["forecast"].items():
        for name, figures in methods.items():
            lines.append(f"{split:<12}{name:<20}{figures['mse']:>12.4f}{figures['mae']:>12.4f}")
    return "\n".join(lines)


def plot(axes: Any, result: dict) -> None:
    """Mean squared errors of the last split."""
    split, methods = list(result["forecast"].items())[-1]
    axes.barh(list(methods), [figures["mse"] for figures in methods.values()])
    axes.set(xlabel="mean squared error", title=f"forecasts ({split})")
