"""Options of Mamba-2 (seqmodels/mixers/mamba2.py)."""

from typing import Any

from seqmodels.fields import Field, Group, above, at_least, between
from seqmodels.fields.field import MOST_EXPANDED
from seqmodels.fields.heads import check_heads
from seqmodels.fields.steps import STEPS, STRETCH, check_steps


def check(options: Any, width: int) -> None:
    """Check that the options fit each other and the model's width."""
    check_heads("mamba2", options, width)
    check_steps("mamba2", options)


MAMBA2 = Group(
    "mamba2",
    {
        "state": Field(16, "N, rows of a head's matrix state", at_least(1)),
        "expand": Field(2, "inner width E as a multiple of the model's width", at_least(1), largest=MOST_EXPANDED),
        "head_dim": Field(8, "P, channels of a head; there are E / P heads", at_least(1)),
        "groups": Field(1, "sets of B and C, each shared by heads / groups heads", at_least(1)),
        "conv": Field(4, "W, tokens that the short convolution sees", between(2, 8)),
        "norm_eps": Field(1e-5, "epsilon of the norm after the gate", above(0)),
        **STEPS,
        **STRETCH,
    },
    check,
)
