"""Inputs by name (`config.model.input`): they turn a batch into the stream [B, T, D] that the blocks read.

A new input is one file, a subclass of `Input`, one line here, and its name in seqmodels/fields/model.py.
"""

from seqmodels.inputs.frames import Frames
from seqmodels.inputs.input import Input
from seqmodels.inputs.one_hot import OneHot
from seqmodels.inputs.patches import Patches
from seqmodels.inputs.tokens import Tokens

INPUTS: dict[str, type[Input]] = {"tokens": Tokens, "frames": Frames, "one_hot": OneHot, "patches": Patches}
