"""Evaluators by name. Each is a module with

    evaluate_run(run, splits, limit) -> dict    # figures of a trained model (`seqmodels.evals.run.Run`), ready for JSON
    table(figures) -> str                       # for the terminal
    plot(axes, figures) -> None                 # on Matplotlib axes; optional

A new evaluator is one file and one line here.
"""

from types import ModuleType

from seqmodels.errors import UserError
from seqmodels.evals import by_position, extrapolation, perplexity

EVALUATORS: dict[str, ModuleType] = {
    "perplexity": perplexity,
    "loss_by_position": by_position,
    "context_lengths": extrapolation,
}


def find(names: list[str]) -> dict[str, ModuleType]:
    """The evaluators of these names. Raises UserError on one that is not."""
    for name in names:
        if name not in EVALUATORS:
            raise UserError(f"--evals={name}: must be one of {', '.join(EVALUATORS)}")
    return {name: EVALUATORS[name] for name in names}
