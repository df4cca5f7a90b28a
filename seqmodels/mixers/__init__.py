"""Mixers by name. A new one is a file here, a config and a line in this table."""

from seqmodels.mixers.attention import Attention
from seqmodels.mixers.mamba import Mamba

MIXERS = {
    "attention": Attention,
    "mamba": Mamba,
}
