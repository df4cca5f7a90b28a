"""Options of the MLP (seqmodels/channels/mlp.py)."""

from seqmodels.fields import Field, Group, at_least, one_of

MLP = Group(
    "mlp",
    {
        "hidden": Field(0, "inner width; 0: 8/3 of the width, rounded up to a multiple of 64", at_least(0)),
        "activation": Field(
            "silu",
            "activation of the inner channels; gelu is the exact one, gelu_tanh its approximation",
            one_of("silu", "gelu", "gelu_tanh", "relu"),
            2,
        ),
        "gated": Field(True, "multiply the activated channels by a second projection, as SwiGLU does", since=2),
    },
)
