"""The contract of an input: how a batch becomes the stream that the blocks read."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Input(nn.Module):
    """Base of all inputs.

    Attributes:
        width: D, of the result.
        size: ids that the array of a batch may hold, or its channels C.
        dtype: of matrix products.
        residual_dtype: of the result.
        std: standard deviation of fresh embeddings.

    Class attributes:
        key: name of its array in a batch, and so in `dataset.spec`.
        ids: whether that array holds ids [B, T] int32; else it holds values [B, T, C].
        at_root: whether its parameters are at the root of the tree, not under the input's name.
    """

    width: int
    size: int
    dtype: DTypeLike = jnp.float32
    residual_dtype: DTypeLike = jnp.float32
    std: float = 0.02

    key: ClassVar[str]
    ids: ClassVar[bool]
    at_root: ClassVar[bool] = False

    def table(self) -> jax.Array | None:
        """[size, D] parameter that a tied head may read, if there is one."""
        return None

    def shortened(
        self, mask: jax.Array | None, segment_ids: jax.Array | None
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """mask and segment_ids [B, T] of a batch to those of the stream, which may have fewer steps."""
        return mask, segment_ids

    def scale(
        self, values: jax.Array, mask: jax.Array | None = None, observed: jax.Array | None = None
    ) -> tuple[jax.Array | float, jax.Array | float]:
        """Mean and deviation that are taken from the array of a batch, and given back to predictions."""
        return 0.0, 1.0

    def __call__(self, array: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The array of a batch to [B, T, D]. mask [B, T] bool is False on padding. None: there is no padding.

        Inputs of values also take `observed`, see `seqmodels.inputs.frames.Frames`.
        """
        raise NotImplementedError
