"""Options of the dilated convolutions (seqmodels/mixers/cnn.py)."""

from seqmodels.fields import Field, Group, between, each_at_least

CNN = Group(
    "cnn",
    {
        "conv": Field(3, "W, tokens that one convolution sees", between(2, 8)),
        "dilations": Field(
            (1, 2, 4, 8),
            "distances of those tokens, one for each convolution of a branch",
            each_at_least(1, "distances between tokens"),
        ),
    },
)
