"""Options of HGRN (seqmodels/mixers/hgrn.py)."""

from seqmodels.fields import Field, Group, above
from seqmodels.fields.diagonal import HIDDEN

HGRN = Group("hgrn", {"hidden": HIDDEN, "norm_eps": Field(1e-5, "epsilon of the norm of the states", above(0))})
