"""Fields of the initial step sizes, shared by Mamba, Mamba-2 and Mamba-3."""

from typing import Any

from seqmodels.fields.field import Field, refuse
from seqmodels.fields.rules import above, at_least

STEPS = {
    "dt_min": Field(1e-3, "smallest step size dt of a fresh model", above(0)),
    "dt_max": Field(1e-1, "largest step size dt of a fresh model; those between are log-uniform", above(0)),
    "dt_floor": Field(1e-4, "no step size of a fresh model is below this", at_least(0)),
}

STRETCH = {
    "dt_scale": Field(
        1.0,
        "factor of every step size dt; below 1 a trained model reads longer rows as it read those of training",
        above(0),
        since=2,
    ),
}


def check_steps(name: str, options: Any) -> None:
    """Raises UserError if the range of step sizes of the branch `name` is empty."""
    if options.dt_max < options.dt_min:
        refuse(f"model.{name}.dt_max", options.dt_max, f"at least dt_min={options.dt_min}")
