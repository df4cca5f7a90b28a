"""Options of Mamba (seqmodels/mixers/mamba.py)."""

from typing import Any

from seqmodels.fields import Field, Group, above, at_least, between, one_of
from seqmodels.fields.field import MOST_EXPANDED
from seqmodels.fields.steps import STEPS, STRETCH, check_steps


def check(options: Any, width: int) -> None:
    """Check that the options fit each other."""
    check_steps("mamba", options)


MAMBA = Group(
    "mamba",
    {
        "state": Field(16, "N, numbers of state for each inner channel", at_least(1)),
        "expand": Field(2, "inner width E as a multiple of the model's width", at_least(1), largest=MOST_EXPANDED),
        "conv": Field(4, "W, tokens that the short convolution sees", between(2, 8)),
        "dt_rank": Field(0, "rank of the step size's projection; 0: a 16th of the width, rounded up", at_least(0)),
        "norms": Field(
            "none",
            "RMSNorm of step size, B and C: none, rms (without weights, as FalconMamba) or learned (with, as Jamba)",
            one_of("none", "rms", "learned"),
        ),
        "norm_eps": Field(1e-5, "epsilon of those norms", above(0), since=2),
        **STEPS,
        **STRETCH,
    },
    check,
)
