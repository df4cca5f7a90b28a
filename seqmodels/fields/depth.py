"""Options of the connections across depth that `model.depth` names. DenseSSM's are `model.dense`. Imports no JAX."""

from typing import Any

from seqmodels.fields import Field, Group, at_least, one_of, refuse

KINDS = ("none", "value", "denseformer", "attnres", "hyper", "mudd")  # values of model.depth

ATTNRES = Group(
    "attnres",
    {
        "form": Field(
            "block",
            "what a step reads: full, the outputs of all steps below; block, sums of them by block; delta, these "
            "outputs and the residual stream",
            one_of("full", "block", "delta"),
            since=2,
        ),
        "blocks": Field(8, "number of blocks of form 'block', beside the embedding", at_least(1), since=2),
    },
)

MOST_PERMUTED = 5  # streams; they have 120 permutations


def check_hyper(options: Any, width: int) -> None:
    """Whether there are few enough permutations of the streams."""
    if options.mixing == "lite" and options.streams > MOST_PERMUTED:
        refuse(HYPER.place("streams"), options.streams, f"at most {MOST_PERMUTED} with mixing='lite'")


HYPER = Group(
    "hyper",
    {
        "streams": Field(4, "n, number of residual streams", at_least(1), since=2),
        "mixing": Field(
            "identity",
            "how the streams are mixed from step to step: identity, not at all; lite, by a mean of all permutations "
            "(mHC-lite); sinkhorn, by a matrix that Sinkhorn's iterations make doubly stochastic (mHC)",
            one_of("identity", "lite", "sinkhorn"),
            since=2,
        ),
    },
    check_hyper,
)
