"""Evaluators by name. Each is a module with

    evaluate_run(run, splits, limit) -> dict    # figures of a trained model (`seqmodels.evals.run.Run`), ready for JSON
    table(figures) -> str                       # for the terminal
    plot(axes, figures) -> None                 # on Matplotlib axes; optional
    serves(run) -> bool                         # whether the run has what it measures; optional: runs of text have

A new evaluator is one file and one line here.
"""

from types import ModuleType

from seqmodels.data import SyntheticDataset
from seqmodels.errors import UserError
from seqmodels.evals import accuracy, by_position, extrapolation, needle, perplexity

EVALUATORS: dict[str, ModuleType] = {
    "perplexity": perplexity,
    "loss_by_position": by_position,
    "context_lengths": extrapolation,
    "accuracy": accuracy,
    "needle": needle,
}
BY_NAME = ("needle",)  # on a run of text, only when asked for


def find(names: list[str]) -> dict[str, ModuleType]:
    """The evaluators of these names. Raises UserError on one that is not."""
    for name in names:
        if name not in EVALUATORS:
            raise UserError(f"--evals={name}: must be one of {', '.join(EVALUATORS)}")
    return {name: EVALUATORS[name] for name in names}


def serves(evaluator: ModuleType, run) -> bool:
    """Whether a run has what an evaluator measures."""
    is_text = not isinstance(run.dataset, SyntheticDataset)
    return evaluator.serves(run) if hasattr(evaluator, "serves") else is_text


def default(run) -> list[str]:
    """The evaluators that a run gets when none is named."""
    is_text = not isinstance(run.dataset, SyntheticDataset)
    return [name for name in EVALUATORS if serves(EVALUATORS[name], run) and not (is_text and name in BY_NAME)]
