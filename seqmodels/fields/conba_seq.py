"""Options of the sequential variant of Conba (seqmodels/mixers/conba_seq.py)."""

from typing import Any

from seqmodels.fields import Field, Group, one_of, refuse
from seqmodels.fields.control import CONTROL, PLANT, check_control


def check(options: Any, width: int) -> None:
    """Check that the options fit each other and the model's width."""
    check_control("conba_seq", options, width)
    if options.stability == "spectral" and options.scaling != "literal":
        refuse("model.conba_seq.stability", "spectral", "'none' unless model.conba_seq.scaling='literal'")


CONBA_SEQ = Group(
    "conba_seq",
    {
        **PLANT,
        "fd": Field(
            "identity",
            "f_d, between recurrence and scaling: identity, a matrix (linear), or an MLP with Swish",
            one_of("identity", "linear", "mlp"),
        ),
        "h": Field(
            "linear", "h, from the state to the readout: C x (linear), or an MLP of it", one_of("linear", "mlp")
        ),
        "scaling": Field(
            "gate",
            "scaling R of the state x: x * swish(Z x + g) (gate), swish(Z x + g) (literal, as in the paper), or off",
            one_of("gate", "literal", "off"),
        ),
        "control": Field(
            "input", "whether the gain's correction goes to the recurrence's input", one_of("off", "input")
        ),
        "rule": Field(
            "nlms",
            "how the gain adapts: normalised least mean squares with forgetting, the published code's law, or MIT rule",
            one_of("nlms", "published", "mit"),
        ),
        "stability": Field(
            "none",
            "spectral: limits Z, so that the literal recurrence without control is a contraction",
            one_of("none", "spectral"),
        ),
        **CONTROL,
    },
    check,
)
