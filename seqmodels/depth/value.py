"""Value residual (Zhou et al. 2024, arXiv 2410.17897): the first layer's values are mixed into those of every layer.

With v^1 the value stream of the first layer and v^l that of layer l, layer l goes on with

    v'^l = a_l v^l + b_l v^1,

with two learned numbers a layer. The paper's learned form starts at a half each; here a = 1 and b = 0, so that a fresh
model is the plain network, which is our choice. The value stream of attention, RetNet and linear attention is v before
heads are summed up. Mamba's and Mamba-2's is x behind the convolution, of which Mamba has computed B, C and dt already.
"""

import jax
import jax.numpy as jnp

from seqmodels.branch import Branch, Links, State
from seqmodels.depth.connection import Carry, Connection
from seqmodels.layers.parameter import parameter
from seqmodels.sequence import Sequence


def own_alone(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """An initialiser: one for the layer's own values, zero for the first layer's."""
    return jnp.array([1, 0], dtype)


class ValueResidual(Connection):
    """The carry is the first layer's values of each kind of mixer, by class. The first layer mixes its own with itself.

    Attributes:
        kinds: class names of the block's branches that have values.
    """

    kinds: tuple[str, ...]

    def setup(self) -> None:
        self.weights = {kind: parameter(self, f"weights_{kind}", (2,), (None,), own_alone) for kind in self.kinds}

    def start(self, x: jax.Array, blocks: object = ()) -> Carry:
        """No values yet."""
        return {}

    def run(
        self, branch: Branch, x: jax.Array, seq: Sequence, state: State, carry: Carry, own: State
    ) -> tuple[jax.Array, State, Carry, State]:
        """Run the branch with mixed values."""
        if not branch.valued:
            return super().run(branch, x, seq, state, carry, own)
        kind, known = type(branch).__name__, dict(carry)

        def mixed(v: jax.Array) -> jax.Array:
            first = known.setdefault(kind, v)
            a, b = self.weights[kind]
            return (a * v.astype(jnp.float32) + b * first.astype(jnp.float32)).astype(v.dtype)

        y, state = branch(x, seq, state, Links(value=mixed))  # type: ignore[call-arg]
        return y, state, known, own
