"""What turns a batch into the stream [B, T, D] that the blocks read, by name (`config.model.input`).

An input is a Linen module with the fields `width` (D), `size`, `dtype`, `residual_dtype` and `std`, and

    key        name of its array in a batch, and so in `dataset.spec`
    ids        whether that array holds ids, of which there are `size`; else it holds `size` channels
    at_root    whether its parameters lie at the root of the tree, and not under the name of the input
    table      [size, D] parameter that a tied head may read, or None
    input(array, mask) -> [B, T, D] in the residual dtype

A new input is one file and one line here.
"""

import flax.linen as nn

from seqmodels.inputs.frames import Frames
from seqmodels.inputs.one_hot import OneHot
from seqmodels.inputs.tokens import Tokens

INPUTS: dict[str, type[nn.Module]] = {"tokens": Tokens, "frames": Frames, "one_hot": OneHot}
