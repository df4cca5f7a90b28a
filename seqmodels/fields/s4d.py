"""Options of S4D (seqmodels/mixers/s4d.py)."""

from typing import Any

from seqmodels.fields import Field, Group, Rule, one_of
from seqmodels.fields.steps import STEPS, STRETCH, check_steps

LARGEST_STATE = 1024  # beyond, the eigenvectors of HiPPO take long, and the sums of the filters lose digits

STATE = Field(
    64,
    "N, states of each channel; one of each conjugate pair is kept, so N / 2 complex numbers",
    Rule(lambda n: n % 2 == 0 and 2 <= n <= LARGEST_STATE, f"even, between 2 and {LARGEST_STATE}"),
)
RANGE = {name: STEPS[name] for name in ("dt_min", "dt_max")}


def check(options: Any, width: int) -> None:
    """Check that the options fit each other."""
    check_steps("s4d", options)


S4D = Group(
    "s4d",
    {
        "state": STATE,
        "init_A": Field(
            "legs",
            "the matrix A of a fresh model: legs (S4's without its part of rank 1), lin, inv (simple series) or "
            "real (-1, -2, ..)",
            one_of("legs", "lin", "inv", "real"),
        ),
        "rule": Field(
            "zoh", "how time is made discrete: zoh (the input is held) or bilinear", one_of("zoh", "bilinear")
        ),
        **RANGE,
        **STRETCH,
    },
    check,
)
