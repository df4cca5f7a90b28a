"""Options of Hyena (seqmodels/mixers/hyena.py)."""

from seqmodels.fields import Field, Group, above, at_least, between

HYENA = Group(
    "hyena",
    {
        "length": Field(
            1024,
            "tokens that the positions of a filter's taps are measured in: features and decay are functions of the "
            "distance divided by it. Longer rows are allowed",
            at_least(1),
        ),
        "conv": Field(3, "W, tokens that the short convolution sees", between(2, 8)),
        "filter_width": Field(64, "hidden units of the network that computes the filters", at_least(1)),
        "bands": Field(1, "frequencies of the positional features that it takes", at_least(1)),
        "frequency": Field(10.0, "frequency of its sine activations in a fresh model", above(0)),
    },
)
