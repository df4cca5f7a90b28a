"""Options of Gated DeltaNet (seqmodels/mixers/gated_deltanet.py)."""

from typing import Any

from seqmodels.fields import Field, Group, above, at_least, between, refuse
from seqmodels.fields.deltanet import NEGATIVE
from seqmodels.fields.steps import STEPS, check_steps


def check(options: Any, width: int) -> None:
    """Check that the options fit each other and the model's width."""
    if options.key_heads and options.heads % options.key_heads:
        refuse("model.gated_deltanet.key_heads", options.key_heads, f"a divisor of heads={options.heads}, or 0")
    if 3 * width % (4 * options.heads) and not options.key_dim:
        allowed = f"such that 3/4 of model.width={width} divide by it, or key_dim must be set"
        refuse("model.gated_deltanet.heads", options.heads, allowed)
    check_steps("gated_deltanet", options)


GATED_DELTANET = Group(
    "gated_deltanet",
    {
        "heads": Field(2, "heads of values, each with a matrix state", at_least(1)),
        "key_heads": Field(
            0, "heads of keys and queries, each for heads / key_heads of values; 0: as many", at_least(0)
        ),
        "key_dim": Field(0, "channels of a head's keys and queries; 0: 3/4 of width / heads", at_least(0)),
        "value_dim": Field(0, "channels of a head's values; 0: twice key_dim", at_least(0)),
        "conv": Field(4, "W, tokens that the short convolutions see", between(2, 8)),
        "negative_eigenvalues": NEGATIVE,
        "norm_eps": Field(1e-5, "epsilon of the heads' norm", above(0)),
        **STEPS,
    },
    check,
)
