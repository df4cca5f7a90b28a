"""Options of S5 (seqmodels/mixers/s5.py)."""

from typing import Any

from seqmodels.fields import Field, Group, at_least, one_of, refuse
from seqmodels.fields.s4d import LARGEST_STATE
from seqmodels.fields.steps import STEPS, STRETCH, check_steps

LARGEST_SYSTEM = 2**16  # P


def check(options: Any, width: int) -> None:
    """Check that the options fit each other."""
    if options.state % (2 * options.blocks):
        refuse("model.s5.state", options.state, f"a multiple of {2 * options.blocks} with blocks={options.blocks}, as "
               "each block has conjugate pairs")  # fmt: skip
    if options.state > LARGEST_STATE * options.blocks:
        refuse("model.s5.state", options.state, f"at most {LARGEST_STATE} for each of blocks={options.blocks}")
    check_steps("s5", options)


S5 = Group(
    "s5",
    {
        "state": Field(
            64,
            "P, size of the state: P / 2 complex numbers, one of each conjugate pair",
            at_least(2),
            largest=LARGEST_SYSTEM,
        ),
        "blocks": Field(1, "J, equal blocks of a fresh state matrix; fewer see further back", at_least(1)),
        "discretization": Field("zoh", "how the system becomes a recurrence", one_of("zoh", "bilinear")),
        "activation": Field(
            "half_glu1",
            "what follows the states: g = gelu(y), then g sigmoid(W g) (half_glu1), y sigmoid(W g) (half_glu2), "
            "V g sigmoid(W g) (full_glu) or g alone (gelu)",
            one_of("half_glu1", "half_glu2", "full_glu", "gelu"),
        ),
        "C_init": Field(
            "trunc_standard_normal",
            "distribution of a fresh output matrix, before it is turned into the basis of the states; complex_normal "
            "is not turned",
            one_of("trunc_standard_normal", "lecun_normal", "complex_normal"),
        ),
        "clip_eigs": Field(True, "real parts of the eigenvalues are at most -1e-4, so that no state grows without end"),
        "rates": Field(
            "standard",
            "what learns at the rate of the group ssm beside eigenvalues and steps, by the authors' names: B without "
            "weight decay (standard) or with it (BandCdecay), nothing (BfastandCdecay), or B, C and D without weight "
            "decay (noBCdecay)",
            one_of("standard", "BandCdecay", "BfastandCdecay", "noBCdecay"),
        ),
        "dt_global": Field(False, "the steps learn at the rate of the rest, and with weight decay"),
        **{name: STEPS[name] for name in ("dt_min", "dt_max")},
        **STRETCH,
    },
    check,
)
