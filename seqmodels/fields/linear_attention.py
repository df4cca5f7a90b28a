"""Options of linear attention (seqmodels/mixers/linear_attention.py)."""

from typing import Any

from seqmodels.fields import Field, Group, at_least, one_of, refuse


def check(options: Any, width: int) -> None:
    """Check that the options fit the model's width."""
    if width % options.heads:
        refuse("model.linear_attention.heads", options.heads, f"a divisor of model.width={width}")


LINEAR_ATTENTION = Group(
    "linear_attention",
    {
        "heads": Field(2, "heads, of width / heads channels each", at_least(1)),
        "feature_map": Field(
            "elu",
            "function of queries and keys in place of the softmax: elu (plus one), relu, softmax (over channels), "
            "taylor (the exponential's first three terms)",
            one_of("elu", "relu", "softmax", "taylor"),
        ),
    },
    check,
)
