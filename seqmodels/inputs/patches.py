"""Neighbouring frames of numbers, several at a time."""

import jax
import jax.numpy as jnp

from seqmodels.inputs.frames import Frames


class Patches(Frames):
    """Every `patch` P frames of [B, T, C] become one step of the stream [B, T / P, D], by a linear layer.

    A patch is real if one of its frames is, and frames of padding in it are zeros. A document begins with a patch: the
    segment of a patch is that of its first frame.

    Attributes:
        patch: P. T must be a multiple of it, in every piece.
    """

    patch: int = 1

    @property
    def features(self) -> int:
        """Numbers that make one step."""
        return self.patch * super().features

    def frames(self, values: jax.Array) -> jax.Array:
        """[B, T, C] to [B, T / P, P C]."""
        batch, length, channels = values.shape
        if length % self.patch:
            raise ValueError(f"{length} frames are no multiple of config.model.patch={self.patch}")
        return values.reshape(batch, length // self.patch, self.patch * channels)

    def shortened(
        self, mask: jax.Array | None, segment_ids: jax.Array | None
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """mask and segment_ids [B, T] to those of the stream [B, T / P]."""
        if mask is not None:
            mask = jnp.any(mask.reshape(mask.shape[0], -1, self.patch), axis=2)
        return mask, None if segment_ids is None else segment_ids[:, :: self.patch]
