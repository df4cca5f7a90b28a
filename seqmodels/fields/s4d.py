"""Options of S4D (seqmodels/mixers/s4d.py), some of which S4 and H3 share."""

from typing import Any

from seqmodels.fields import Field, Group, Rule, one_of
from seqmodels.fields.steps import STEPS, STRETCH, check_steps

LARGEST_STATE = 1024  # beyond, the eigenvectors of HiPPO take long

STATE = Field(
    64,
    "N, states of each channel; one of each conjugate pair is kept, so N / 2 complex numbers",
    Rule(lambda n: n % 2 == 0 and 2 <= n <= LARGEST_STATE, f"between 2 and {LARGEST_STATE}, and even"),
)
RULE = Field("zoh", "how time is made discrete: zoh (the input is held) or bilinear", one_of("zoh", "bilinear"))
RANGE = {name: STEPS[name] for name in ("dt_min", "dt_max")}


def initial_A(default: str) -> Field:
    """The field that names the matrix A of a fresh model."""
    meaning = "A of a fresh model: legs (that of S4 without its part of rank 1), lin, inv or real (see the paper)"
    return Field(default, meaning, one_of("legs", "lin", "inv", "real"))


def check(options: Any, width: int) -> None:
    """Check that the options fit each other."""
    check_steps("s4d", options)


S4D = Group("s4d", {"state": STATE, "init_A": initial_A("legs"), "rule": RULE, **RANGE, **STRETCH}, check)
