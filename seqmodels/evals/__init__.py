"""Evaluators by name. Each is a module with

    evaluate_run(run, splits, limit) -> dict    # figures of a trained model (`seqmodels.evals.run.Run`), ready for JSON
    table(figures) -> str                       # for the terminal
    plot(axes, figures) -> None                 # on Matplotlib axes; optional; or PLOTS, a tuple of such functions
    serves(run) -> bool                         # whether the run has what it measures; optional, default: runs on text
    check(config) -> None                       # UserError for settings that it cannot use, before training; optional

A new evaluator is one file and one line here.
"""

from types import ModuleType

from ml_collections import ConfigDict

from seqmodels.errors import UserError
from seqmodels.evals import (
    accuracy,
    by_position,
    classification,
    context_lengths,
    extrapolation,
    figures,
    forecast,
    harness,
    needle,
    perplexity,
    qa,
    rate,
    reconstruction,
    throughput,
    training_speed,
)
from seqmodels.evals.run import RunData

EVALUATORS: dict[str, ModuleType] = {
    "perplexity": perplexity,
    "loss_by_position": by_position,
    "context_lengths": context_lengths,
    "extrapolation": extrapolation,
    "accuracy": accuracy,
    "figures": figures,
    "rate": rate,
    "forecast": forecast,
    "needle": needle,
    "classification": classification,
    "reconstruction": reconstruction,
    "qa": qa,
    "throughput": throughput,
    "training_speed": training_speed,
    "lm_eval": harness,
}
BY_NAME = (  # only when asked for
    "extrapolation",
    "forecast",
    "rate",
    "classification",
    "qa",
    "reconstruction",
    "throughput",
    "training_speed",
    "lm_eval",
)
BY_NAME_ON_TEXT = ("needle", *BY_NAME)


def find(names: list[str], field: str = "--evals") -> dict[str, ModuleType]:
    """The evaluators of these names. Raises UserError for a name that is not there."""
    for name in names:
        if name not in EVALUATORS:
            raise UserError(f"{field}={name}: must be one of {', '.join(EVALUATORS)}")
    return {name: EVALUATORS[name] for name in names}


def serves(evaluator: ModuleType, run: RunData) -> bool:
    """Whether a run has what an evaluator measures."""
    return evaluator.serves(run) if hasattr(evaluator, "serves") else is_text(run)


def is_text(run: RunData) -> bool:
    """Whether the data of a run is text, with a tokenizer and the bytes of its splits."""
    return run.dataset.measured_by == "perplexity"


def check(evaluators: dict[str, ModuleType], run: RunData, field: str = "--evals") -> None:
    """Raises UserError for an evaluator that does not fit a run, which need not be trained yet."""
    for name, evaluator in evaluators.items():
        if not serves(evaluator, run):
            raise UserError(f"{field}={name}: does not fit this run; {', '.join(default(run))} do")
        if hasattr(evaluator, "check"):
            evaluator.check(run.config)


def default(run: RunData) -> list[str]:
    """The evaluators that a run gets when none is named."""
    left_out = BY_NAME_ON_TEXT if is_text(run) else BY_NAME
    return [name for name in EVALUATORS if serves(EVALUATORS[name], run) and name not in left_out]


def named(config: ConfigDict) -> list[str]:
    """The names in `config.evals`."""
    return [name for name in map(str.strip, config.evals.split(",")) if name]
