"""Mixers by name. A new one is a file here, a config and a line in this table."""

from seqmodels.mixers.attention import Attention
from seqmodels.mixers.mamba import Mamba
from seqmodels.mixers.mamba2 import Mamba2
from seqmodels.mixers.retnet import RetNet

MIXERS = {
    "attention": Attention,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "retnet": RetNet,
}
