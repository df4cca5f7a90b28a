"""Options of the connections across depth that `model.depth` names. DenseSSM's are `model.dense`. Imports no JAX."""

from seqmodels.fields import Field, Group, at_least, one_of

KINDS = ("none", "denseformer", "attnres", "hyper")  # values of model.depth

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
)
