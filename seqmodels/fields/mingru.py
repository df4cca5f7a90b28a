"""Options of minGRU (seqmodels/mixers/mingru.py)."""

from seqmodels.fields import Group
from seqmodels.fields.diagonal import CANDIDATE, HIDDEN

MINGRU = Group("mingru", {"hidden": HIDDEN, "candidate": CANDIDATE})
