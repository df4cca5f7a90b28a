"""Options of minLSTM (seqmodels/mixers/minlstm.py)."""

from seqmodels.fields import Field, Group, at_least
from seqmodels.fields.diagonal import CANDIDATE, HIDDEN

MINLSTM = Group(
    "minlstm",
    {
        "hidden": HIDDEN,
        "candidate": CANDIDATE,
        "forget_bias": Field(1.0, "fresh bias of the forget gate: larger remembers longer", at_least(0)),
    },
)
