"""Options of H3 (seqmodels/mixers/h3.py)."""

from typing import Any

from seqmodels.fields import Field, Group, between
from seqmodels.fields.s4d import RANGE, RULE, STATE, initial_A
from seqmodels.fields.steps import STRETCH, check_steps


def check(options: Any, width: int) -> None:
    """Check that the options fit each other."""
    check_steps("h3", options)


H3 = Group(
    "h3",
    {
        "state": STATE,
        "init_A": initial_A("lin"),
        "rule": RULE,
        "conv": Field(4, "W, tokens that the shift filter of the keys sees", between(2, 8)),
        **RANGE,
        **STRETCH,
    },
    check,
)
