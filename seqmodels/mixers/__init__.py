"""Mixers by name. A new one is a file here, a config and a line in this table."""

from seqmodels.mixers.attention import Attention
from seqmodels.mixers.gla import Gla
from seqmodels.mixers.linear_attention import LinearAttention
from seqmodels.mixers.mamba import Mamba
from seqmodels.mixers.mamba2 import Mamba2
from seqmodels.mixers.mamba3 import Mamba3
from seqmodels.mixers.performer import Performer
from seqmodels.mixers.retnet import RetNet

MIXERS = {
    "attention": Attention,
    "gla": Gla,
    "linear_attention": LinearAttention,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "performer": Performer,
    "retnet": RetNet,
}
