"""Fields that minGRU, minLSTM and HGRN share."""

from seqmodels.fields.field import Field
from seqmodels.fields.rules import at_least, one_of

HIDDEN = Field(0, "E, width of the state; 0: the model's width", at_least(0))
CANDIDATE = Field(
    "linear",
    "what enters the state: linear, or positive (x + 1/2, below zero sigmoid(x)), which the authors need to compute "
    "with logarithms and we do not",
    one_of("linear", "positive"),
)
