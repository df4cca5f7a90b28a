"""Options of DeltaNet (seqmodels/mixers/deltanet.py)."""

from typing import Any

from seqmodels.fields import Field, Group, above, at_least, between, refuse


def check(options: Any, width: int) -> None:
    """Check that the options fit the model's width."""
    if width % options.heads and not (options.key_dim and options.value_dim):
        allowed = f"a divisor of model.width={width}, or key_dim and value_dim must be set"
        refuse("model.deltanet.heads", options.heads, allowed)


NEGATIVE = Field(False, "steps beta in (0, 2) in place of (0, 1), so that the recurrence has negative eigenvalues too")

DELTANET = Group(
    "deltanet",
    {
        "heads": Field(2, "heads, each with a matrix state", at_least(1)),
        "key_dim": Field(0, "channels of a head's keys and queries; 0: width / heads", at_least(0)),
        "value_dim": Field(0, "channels of a head's values; 0: width / heads", at_least(0)),
        "conv": Field(4, "W, tokens that the short convolutions see", between(2, 8)),
        "negative_eigenvalues": NEGATIVE,
        "norm_eps": Field(1e-5, "epsilon of the heads' norm", above(0)),
    },
    check,
)
