"""S4 (Gu et al. 2022, arXiv 2111.00396): a state space model whose A is a diagonal matrix minus one of rank 1.

    dh/dt = (diag(L) - P P*) h + B x,   y = 2 Re(C h) + D x,     made discrete by the bilinear rule

L, P and B of a fresh model are HiPPO-LegS in the basis of its normal part. The equations are in
seqmodels/kernels/long_conv/dplr.py. The recurrence takes N operations a token, not N^2, as a step is diagonal plus rank
1 as well; but it advances token by token, which is slow on accelerators. The parameter C is the readout itself, where
the authors' code learns C (1 - A^L) for one length L: so rows may be of any length, and convolution and recurrence
agree. Finding that product takes log2(L) products of N x N matrices for each channel and call, whatever the batch.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.fields.s4 import S4 as OPTIONS
from seqmodels.kernels.arrays import expand_to
from seqmodels.kernels.long_conv.dplr import Dplr, bilinear, dplr_filter, real_sum
from seqmodels.kernels.segments import forget
from seqmodels.kernels.tuning import UNROLLED
from seqmodels.layers.hippo import nplr
from seqmodels.mixers.lti import Lti, everywhere


class Readable(NamedTuple):
    """A system by the bilinear rule with its readout C [N / 2, E]."""

    continuous: Dplr
    c: jax.Array

    def filter(self, length: int) -> jax.Array:
        """The taps [L, E]."""
        return dplr_filter(self.continuous, self.c, length)

    def scan(
        self, x: jax.Array, h: jax.Array, reset: jax.Array | None, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """See `lti.System`."""
        advance = bilinear(self.continuous)

        def step(h, token):
            x, reset, mask = token
            new = advance(forget(h, reset), x)
            h = new if mask is None else jnp.where(expand_to(mask, h.ndim), new, h)
            return h, real_sum(self.c * h)

        tokens = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (x, reset, mask))
        few = x.shape[1] <= UNROLLED
        h, y = jax.lax.scan(step, h, tokens, unroll=x.shape[1] if few else 1)
        return jnp.moveaxis(y, 0, 1), h


class LowRank(Dplr):
    """The continuous system of a layer, see `lti.Continuous`."""

    def at(self, c: jax.Array, stretch: float | jax.Array) -> Readable:
        """It with the readout c, by the bilinear rule; all tokens have the same step."""
        return Readable(self._replace(dt=stretch * self.dt), c)


class S4(Lti):
    """S4 mixer. Its options are declared in seqmodels/fields/s4.py."""

    state: int = OPTIONS["state"]
    dt_min: float = OPTIONS["dt_min"]
    dt_max: float = OPTIONS["dt_max"]
    dt_scale: float = OPTIONS["dt_scale"]

    options = OPTIONS
    follows_time = "rate"  # other steps of each token would need another matrix of rank 1 for each
    state_operations = 6 + 4 + 4 + 4 + 4  # a h, the sum of q h, - w of it, + b x, and the readout
    counted = 2 * (2 + 2 + 2 + 2)  # L, P, B and C

    @nn.nowrap
    def declare_system(self) -> LowRank:
        """Fresh, it is HiPPO-LegS in every channel."""
        form = nplr(self.state)
        decay = -jnp.exp(self.per_state("L_log", everywhere(np.log(-form.eigenvalues.real))))
        rotation = self.per_state("L_imag", everywhere(form.eigenvalues.imag))
        P, B = self.complex_per_state("P", form.low_rank), self.complex_per_state("B", form.input)
        return LowRank(jax.lax.complex(decay, rotation), P, B, self.step_size())
