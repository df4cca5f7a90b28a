"""Options of S4 (seqmodels/mixers/s4.py)."""

from typing import Any

from seqmodels.fields import Group
from seqmodels.fields.s4d import RANGE, STATE
from seqmodels.fields.steps import STRETCH, check_steps


def check(options: Any, width: int) -> None:
    """Check that the options fit each other."""
    check_steps("s4", options)


S4 = Group("s4", {"state": STATE, **RANGE, **STRETCH}, check)
