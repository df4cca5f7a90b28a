"""Options of gated linear attention (seqmodels/mixers/gla.py)."""

from typing import Any

from seqmodels.fields import Field, Group, above, at_least, refuse


def check(options: Any, width: int) -> None:
    """Check that the options fit the model's width."""
    if width % (2 * options.heads) and not (options.key_dim and options.value_dim):
        allowed = f"half a divisor of model.width={width}, or key_dim and value_dim must be set"
        refuse("model.gla.heads", options.heads, allowed)


GLA = Group(
    "gla",
    {
        "heads": Field(2, "heads, each with a matrix state", at_least(1)),
        "key_dim": Field(0, "channels of a head's keys and queries; 0: width / heads / 2", at_least(0)),
        "value_dim": Field(0, "channels of a head's values; 0: width / heads", at_least(0)),
        "gate_rank": Field(16, "inner width of the decays' projection", at_least(1)),
        "gate_divisor": Field(16.0, "divides the logarithms of the decays: larger remembers longer", at_least(1)),
        "norm_eps": Field(1e-5, "epsilon of the heads' norm", above(0)),
    },
    check,
)
