"""Options of RWKV-4's time mix (seqmodels/mixers/rwkv.py)."""

from seqmodels.fields import Field, Group, at_least

RWKV = Group("rwkv", {"hidden": Field(0, "E, channels of the average; 0: the model's width", at_least(0))})
