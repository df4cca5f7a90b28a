"""Options of Conba (seqmodels/mixers/conba.py)."""

from typing import Any

from seqmodels.fields import Field, Group, at_least, one_of, refuse
from seqmodels.fields.control import CONTROL, PLANT, check_control


def check(options: Any, width: int) -> None:
    """Check that the options fit each other and the model's width."""
    check_control("conba", options, width)
    if options.control != "input" and options.sweeps != 1:
        refuse("model.conba.sweeps", options.sweeps, "1, its default, unless model.conba.control='input'")
    if options.state_eval == "folded":
        for name, wrong, allowed in (
            ("scaling", options.scaling == "literal", "'gate' or 'off'"),
            ("control", options.control == "input", "'off' or 'output'"),
            ("process_noise", options.process_noise > 0, "0"),
        ):
            if wrong:
                refuse(f"model.conba.{name}", getattr(options, name), f"{allowed} with model.conba.state_eval='folded'")


CONBA = Group(
    "conba",
    {
        **PLANT,
        "delay": Field(1, "tau: the delayed state adds F times the state of tau tokens earlier", at_least(0)),
        "scaling": Field(
            "gate",
            "scaling R of the state x: x * swish(Z x + g) (gate), swish(Z x + g) (literal, as in the paper), or off",
            one_of("gate", "literal", "off"),
        ),
        "control": Field(
            "output",
            "where the gain's correction goes: to the readout (output), the recurrence's input (input), nowhere (off)",
            one_of("off", "output", "input"),
        ),
        "sweeps": Field(1, "passes that feed the correction back, with control=input", at_least(1)),
        "rule": Field(
            "nlms",
            "how the gain adapts: normalised least mean squares with forgetting, or the published code's law",
            one_of("nlms", "published"),
        ),
        "state_eval": Field(
            "exact",
            "scaling by the state (exact), or by the token, which Mamba's kernel can run (folded: an approximation)",
            one_of("exact", "folded"),
        ),
        **CONTROL,
    },
    check,
)
