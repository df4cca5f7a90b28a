"""Options of GRU (seqmodels/mixers/gru.py)."""

from seqmodels.fields import Field, Group, at_least

GRU = Group("gru", {"hidden": Field(0, "E, width of the state; 0: the model's width", at_least(0))})
