"""Options of Mamba-3 (seqmodels/mixers/mamba3.py)."""

from typing import Any

from seqmodels.fields import Field, Group, above, at_least, one_of, refuse
from seqmodels.fields.field import MOST_EXPANDED
from seqmodels.fields.heads import check_heads
from seqmodels.fields.steps import STEPS, STRETCH, check_steps


def check(options: Any, width: int) -> None:
    """Check that the options fit each other and the model's width."""
    check_heads("mamba3", options, width)
    if options.state * options.rotated % 2:
        refuse("model.mamba3.state", options.state, f"a multiple of {round(2 / options.rotated)} with "
               f"rotated={options.rotated}, as rotations turn pairs")  # fmt: skip
    check_steps("mamba3", options)


MAMBA3 = Group(
    "mamba3",
    {
        "state": Field(16, "N, rows of a head's matrix state", at_least(1)),
        "expand": Field(2, "inner width E as a multiple of the model's width", at_least(1), largest=MOST_EXPANDED),
        "head_dim": Field(8, "P, channels of a head; there are E / P heads", at_least(1)),
        "groups": Field(1, "sets of B and C, each shared by heads / groups heads", at_least(1)),
        "rotated": Field(0.5, "share of the N channels of B and C that are rotated", one_of(0.5, 1.0)),
        "A_activation": Field(
            "heavy_tail",
            "function that makes the decay rate of the token's number; softplus: the authors' before June 2026",
            one_of("heavy_tail", "softplus"),
        ),
        "norm_eps": Field(1e-5, "epsilon of the norms of B and C", above(0)),
        **STEPS,
        **STRETCH,
    },
    check,
)
