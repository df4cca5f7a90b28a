"""Options of the mixture of experts (seqmodels/channels/moe.py)."""

from typing import Any

from seqmodels.fields import Field, Group, above, at_least, one_of, refuse


def check(options: Any, width: int) -> None:
    """Check that the options fit each other."""
    experts, top_k = options.experts, options.top_k
    if top_k > experts:
        refuse("model.moe.top_k", top_k, f"at most model.moe.experts={experts}")
    if top_k == 1 < experts and options.router != "softmax":
        allowed = f"at least 2 with router={options.router!r}: normalised, a single weight is 1, and the router learns"
        refuse("model.moe.top_k", top_k, f"{allowed} nothing from the task")


MOE = Group(
    "moe",
    {
        "experts": Field(8, "number of experts, each an MLP with SwiGLU", at_least(1)),
        "top_k": Field(2, "experts that each token goes to", at_least(1)),
        "hidden": Field(
            0, "inner width of an expert; 0: 8/3 of the width, rounded up to a multiple of 64", at_least(0)
        ),
        "router": Field(
            "softmax",
            "weights of a token's experts: softmax, their probabilities (Jamba); renormalised, divided by their sum "
            "(Mixtral); sigmoid, their sigmoids divided by the sum, chosen with a bias for the load (DeepSeek-V3)",
            one_of("softmax", "renormalised", "sigmoid"),
        ),
        "scale": Field(1.0, "factor of the weights", above(0)),
        "shared": Field(0, "shared experts: every token goes to them too, with the weight 1", at_least(0)),
        "shared_gate": Field(
            False,
            "the weight of the shared experts is the sigmoid of a projection of the token, as in Qwen3-Next",
            since=2,
        ),
        "capacity": Field(
            0.0,
            "capacity factor: in training an expert takes at most this many times its equal share of a row's tokens, "
            "and the rest is dropped; 0: nothing is dropped",
            at_least(0),
        ),
        "balance": Field(0.01, "coefficient of the load balance loss", at_least(0)),
        "z_loss": Field(0.001, "coefficient of the router's z-loss", at_least(0)),
        "bias_rate": Field(
            0.001, "with router='sigmoid': step of the bias against the load, in every training step", at_least(0)
        ),
    },
    check,
)
