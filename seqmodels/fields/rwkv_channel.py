"""Options of RWKV-4's channel mix (seqmodels/channels/rwkv_channel.py)."""

from seqmodels.fields import Field, Group, at_least

RWKV_CHANNEL = Group("rwkv_channel", {"hidden": Field(0, "inner width; 0: four times the model's width", at_least(0))})
