"""Mixture of experts (Shazeer et al. 2017, 1701.06538): a router sends each token to K of X MLPs.

y = sum_j w_j expert_j(x), over the token's K experts, with the weights of `seqmodels.layers.routing`. Each expert is an
MLP with SwiGLU. Nothing is dropped, except in training with a capacity.
"""

import flax.linen as nn
import jax

from seqmodels.branch import Branch, State, real
from seqmodels.channels.experts import run_experts
from seqmodels.channels.mlp import gated_mlp, inner_width
from seqmodels.fields.moe import MOE
from seqmodels.layers import routing
from seqmodels.layers.parameter import normal, parameter, residual_std, zeros
from seqmodels.sequence import Sequence


class Moe(Branch):
    """Mixture of experts. Its options are declared in seqmodels/fields/moe.py."""

    experts: int = MOE["experts"]
    top_k: int = MOE["top_k"]
    hidden: int = MOE["hidden"]
    router: str = MOE["router"]
    scale: float = MOE["scale"]
    shared: int = MOE["shared"]
    capacity: float = MOE["capacity"]
    balance: float = MOE["balance"]
    z_loss: float = MOE["z_loss"]
    bias_rate: float = MOE["bias_rate"]

    options = MOE
    operations = ("grouped_matmul",)

    @nn.nowrap
    def idle_parameters(self) -> int:
        """Those of the experts that a token does not go to."""
        return (self.experts - self.top_k) * 3 * self.width * inner_width(self.hidden, self.width)

    @nn.compact
    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D]; no state."""
        x, inner = real(x, seq, self.dtype), inner_width(self.hidden, self.width)
        sizes, out = (self.experts, self.width, 2, inner), normal(residual_std(self.layers))
        gate_up = self.matrix("gate_up", sizes, ("expert", "embed", None, "mlp"), normal(0.02))
        down = self.matrix("down", (self.experts, inner, self.width), ("expert", "mlp", "embed"), out)
        route = self.route(x, seq.mask)
        y = run_experts(x, route, gate_up, down, self.implementation.get("grouped_matmul"))
        if self.shared:
            inner *= self.shared
            gate_up = self.matrix("shared_gate_up", (self.width, 2, inner), ("embed", None, "mlp"), normal(0.02))
            down = self.matrix("shared_down", (inner, self.width), ("mlp", "embed"), out)
            y += gated_mlp(x, (gate_up[:, 0], None), (gate_up[:, 1], None), (down, None))
        return y, {}

    @nn.nowrap
    def route(self, x: jax.Array, mask: jax.Array | None) -> routing.Route:
        """Experts and weights of tokens x [B, T, D]. It reports the losses and the figures of the router."""
        weight = parameter(self, "router", (self.width, self.experts), ("embed", None), normal(0.02))
        logits = routing.router_logits(x, weight)
        if self.router == "sigmoid":
            bias = parameter(self, "router_bias", (self.experts,), (None,), zeros)
            route = routing.sigmoid_route(logits, bias, self.top_k)
        else:
            route = routing.softmax_route(logits, self.top_k, self.router == "renormalised")
        route = route._replace(weights=route.weights * self.scale)
        return route if mask is None else routing.send_nowhere(route, mask[..., None], self.experts)
