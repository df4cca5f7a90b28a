"""The base of DenseSSM's fusions, of which there is one for each kind of state (`Branch.link`)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from seqmodels.depth.gates import Gates
from seqmodels.sequence import Sequence


class Fusion(nn.Module):
    """Fuses a layer with the streams of the layers below it.

    Attributes:
        options: config.model.dense.
        width: D. inner, state: channels of the layer's output, and numbers of state, which the gates have.
        sources: how many layers below are read: m, or fewer near the bottom. It may be 0 with OUTPUT, where the layer
            only passes its readout up.

    Class attributes:
        allowed: values of those fields of `options` of which not all are possible.
    """

    options: Any
    width: int
    inner: int
    state: int
    sources: int
    dtype: DTypeLike
    implementation: Mapping[str, str]

    allowed: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def setup(self) -> None:
        if self.sources:
            self.gates = Gates(self.options, self.width, self.inner, self.state, self.sources, self.dtype)
            nn.share_scope(self, self.gates)

    @nn.nowrap
    def init_state(self, batch: int) -> jax.Array | None:
        """The state besides the layer's own; None: there is none."""
        return None

    @nn.nowrap
    def flops(self) -> float:
        """Operations per token of the forward pass in the lower states."""
        raise NotImplementedError

    def __call__(
        self,
        x: jax.Array,
        own: Any,
        readout: Any,
        sources: tuple[Any, ...],
        seq: Sequence,
        carried: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None, Any]:
        """The layer's scan, fused.

        Args:
            x: [B, T, D] normalised input of the layer, from which the gates are computed.
            own, readout: the layer's own stream and readout.
            sources: streams of the layers below, the nearest first.
            carried: as `init_state`.

        Returns:
            y as the mixer's `project` takes it; the layer's own (unfused) new state; the new `carried`; the layer's
            stream.
        """
        raise NotImplementedError
