"""Options of Griffin's recurrent block (seqmodels/mixers/rglru.py)."""

from typing import Any

from seqmodels.fields import Field, Group, at_least, between, refuse


def check(options: Any, width: int) -> None:
    """Check that the state divides into the heads."""
    if (options.hidden or width) % options.heads:
        inner = f"hidden={options.hidden}" if options.hidden else f"model.width={width}"
        refuse("model.rglru.heads", options.heads, f"a divisor of {inner}")


RGLRU = Group(
    "rglru",
    {
        "hidden": Field(0, "E, width of the state; 0: the model's width", at_least(0)),
        "heads": Field(4, "blocks of the gates' block-diagonal matrices", at_least(1)),
        "conv": Field(4, "W, tokens that the short convolution sees", between(2, 8)),
    },
    check,
)
