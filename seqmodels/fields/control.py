"""Fields that Conba and its sequential variant share: Mamba's sizes, the heads of control, and noise in training."""

from typing import Any

from seqmodels.fields.field import MOST_EXPANDED, Field, refuse
from seqmodels.fields.rules import above, at_least, between, one_of
from seqmodels.fields.steps import STEPS, check_steps

PLANT = {
    "state": Field(16, "N, numbers of state for each inner channel", at_least(1)),
    "expand": Field(2, "inner width E as a multiple of the model's width", at_least(1), largest=MOST_EXPANDED),
    "conv": Field(4, "W, tokens that the short convolution sees", between(2, 8)),
    "dt_rank": Field(0, "rank of the step size's projection; 0: a 16th of the width, rounded up", at_least(0)),
    "norms": Field(
        "learned",
        "RMSNorm of step size, B and C: none, rms (without weights) or learned (with, as Jamba)",
        one_of("none", "rms", "learned"),
    ),
    "norm_eps": Field(1e-6, "epsilon of those norms", above(0)),
    **STEPS,
}

CONTROL = {
    "head_dim": Field(
        8, "P, channels of a head of control, whose gain is a P x P matrix; MixCon's size is 64", at_least(1)
    ),
    "gain": Field(
        "input",
        "step and memory of the gain's adaptation: of each token (input), or constants of a head (scalar)",
        one_of("input", "scalar"),
    ),
    "process_noise": Field(0.0, "standard deviation of the noise on the state, in training only", at_least(0)),
    "observation_noise": Field(0.0, "standard deviation of the noise on the readout, in training only", at_least(0)),
}


def check_control(name: str, options: Any, width: int) -> None:
    """Raises UserError unless the inner channels divide into heads of `head_dim`, and the step sizes have a range."""
    inner = options.expand * width
    if inner % options.head_dim:
        refuse(f"model.{name}.head_dim", options.head_dim, f"a divisor of expand * model.width = {inner}")
    check_steps(name, options)
