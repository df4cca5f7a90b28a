"""DenseSSM as a connection across depth: a layer's recurrence is fused with the hidden streams of the layers below."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from seqmodels.branch import Branch, State
from seqmodels.depth.connection import Carry, Connection
from seqmodels.depth.fusion import Fusion
from seqmodels.depth.lti import LtiFusion
from seqmodels.depth.matrix import MatrixFusion
from seqmodels.depth.vector import VectorFusion
from seqmodels.mixers.linked import Linked
from seqmodels.sequence import Sequence

FUSIONS: dict[str, type[Fusion]] = dict(vector=VectorFusion, matrix=MatrixFusion, lti=LtiFusion)  # by `Branch.link`


class Dense(Connection):
    """The carry holds the streams of the last `options.depth` blocks that have one, the nearest first.

    Attributes:
        options: config.model.dense.
        width: D.
        sources: how many of the streams below it this block reads.
        link: kind of the block's branch, a key of FUSIONS; "" if it has no stream.
        sizes: fields of its fusion that give the size of the branch's state.
        keeps: whether a layer may keep its states, for READ. A scan over blocks or rematerialisation would save copies.
    """

    options: Any
    width: int
    sources: int
    link: str
    sizes: Mapping[str, Any]
    dtype: DTypeLike
    implementation: Mapping[str, str]
    keeps: bool = False

    @property
    def fuses(self) -> bool:
        """Whether there is something to fuse. OUTPUT passes up the branch's readout, also from the bottom layer."""
        return bool(self.link) and (self.sources > 0 or self.options.variant == "output")

    @nn.nowrap
    def fusion_module(self, **parent: Any) -> Fusion:
        """The fusion of the branch's kind of state."""
        common = dict(options=self.options, width=self.width, sources=self.sources, dtype=self.dtype)
        return FUSIONS[self.link](**common, implementation=self.implementation, **self.sizes, **parent)

    def setup(self) -> None:
        if self.fuses:
            self.fusion = self.fusion_module()
            nn.share_scope(self, self.fusion)

    def run(
        self, branch: Branch, x: jax.Array, seq: Sequence, state: State, carry: Carry, own: State
    ) -> tuple[jax.Array, State, Carry, State]:
        """Run a branch. If it writes a stream, fuse it with the streams below."""
        if not isinstance(branch, Linked):
            return super().run(branch, x, seq, state, carry, own)
        stream, readout = branch.stream_and_readout(x, seq, state)
        if self.keeps:
            stream = branch.keep(stream, seq, readers=self.options.depth)
        if self.fuses:
            sources = carry[: self.sources]
            y, ssm, own, stream = self.fusion(x, stream, readout, sources, seq, own if jax.tree.leaves(own) else None)
        else:
            y, ssm = branch.scan(stream, readout, seq)
        carry = (stream, *carry)[: self.options.depth]
        return branch.project(y), branch.new_state(readout, ssm), carry, {} if own is None else own

    @nn.nowrap
    def init_state(self, batch: int) -> State:
        """CARRY's extra state, see `VectorFusion.init_state`; else {}."""
        carried = self.fusion_module(parent=None).init_state(batch) if self.fuses else None
        return {} if carried is None else carried

    @nn.nowrap
    def flops(self) -> float:
        """Operations per token of the forward pass in the states of the layers below."""
        return self.fusion_module(parent=None).flops() if self.fuses else 0.0
