"""What a sweep is asked for beside its trials, checked before any of them starts: evaluators and the metric."""

from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from seqmodels.data.contract import FIGURES
from seqmodels.errors import UserError
from seqmodels.fields.run import kind_of_data
from seqmodels.nearest import nearest
from seqmodels.sweeps.results import EQUAL_TIME, Result

OF_ANY = (
    *("train_loss", EQUAL_TIME, "tokens_per_second", "train_seconds", "steps_done"),
    *("parameters", "state_bytes_per_sequence"),
)


def check_evaluators(config: ConfigDict, names: list[str], field: str) -> None:
    """Checks that these evaluators are there, fit the data of a trial, and have the files that they read.

    Args:
      config: of the trial.
      field: who named them, for the message.

    Raises: UserError.
    """
    from seqmodels import evals  # imports JAX

    evals.check(evals.find(names, field), SimpleNamespace(config=config, dataset=_dataset(config)), field)


def check_metric(metric: str, config: ConfigDict, evals: str, others: list[Result]) -> None:
    """Checks that trials of this config, or results that are there already, may have a figure of this name.

    Args:
      metric: its name; "" is always right. What eval.py adds to it, under "eval.", is known only when it has run.
      evals: evaluators of the trials; "none": there are none.

    Raises: UserError.
    """
    if not metric or any(metric in result.figures for result in others):
        return
    if metric.startswith("eval.") and evals != "none":
        return
    by = measured_by(config)
    figures = (*FIGURES[by], *(["xz_bits_per_byte"] if by == "perplexity" else []))
    splits = [f"{split}.{name}" for split in ("validation", "test") for name in figures]
    known = [*splits, *OF_ANY]
    if metric not in known:
        raise UserError(f"--metric={metric}: no such figure{nearest(metric, known)}")


def measured_by(config: ConfigDict) -> str:
    """How the splits of a config's data are measured, as `BatchSource.measured_by` says it."""
    return {"task": "accuracy", "domain": "head", "text": "perplexity"}[kind_of_data(config)]


def _dataset(config: ConfigDict) -> Any:
    """What says which evaluators fit, without a text: the dataset of a task, or the words for one of text."""
    if (by := measured_by(config)) != "accuracy":
        return SimpleNamespace(measured_by=by)
    from seqmodels.data import synthetic

    return synthetic.load(config.data, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed)
