"""Options of the Performer (seqmodels/mixers/performer.py)."""

from typing import Any

from seqmodels.fields import Field, Group, at_least, refuse


def check(options: Any, width: int) -> None:
    """Check that the options fit the model's width."""
    if width % options.heads:
        refuse("model.performer.heads", options.heads, f"a divisor of model.width={width}")


PERFORMER = Group(
    "performer",
    {
        "heads": Field(2, "heads, of width / heads channels each", at_least(1)),
        "random_features": Field(16, "random features of each head", at_least(1)),
        "orthogonal": Field(True, "draw the features' directions at right angles to each other"),
        "seed": Field(0, "seed of the random features", largest=2**63 - 1),
        "redraw": Field(0, "training steps after which the features are drawn again; 0: never", at_least(0)),
        "qk_norm": Field(False, "RMSNorm of queries and keys, which bounds the estimate's variance"),
    },
    check,
)
