"""Options of LSTM (seqmodels/mixers/lstm.py)."""

from seqmodels.fields import Field, Group, at_least

LSTM = Group(
    "lstm",
    {
        "hidden": Field(0, "E, width of the state; 0: the model's width", at_least(0)),
        "forget_bias": Field(1.0, "added to the fresh biases of the forget gate: larger remembers longer", at_least(0)),
    },
)
