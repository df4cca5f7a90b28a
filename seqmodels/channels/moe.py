"""Mixture of experts (Shazeer et al. 2017, 1701.06538): a router sends each token to K of X MLPs.

y = sum_j w_j expert_j(x), over the token's K experts, with the weights of `seqmodels.layers.routing`. Each expert is an
MLP with SwiGLU. Nothing is dropped, except in training with a capacity.
"""

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.branch import Branch, State, real
from seqmodels.channels.experts import run_experts
from seqmodels.channels.mlp import gated_mlp, inner_width
from seqmodels.fields.moe import MOE
from seqmodels.layers import routing
from seqmodels.layers.parameter import normal, parameter, residual_std, zeros
from seqmodels.parallel import mean_over_rows
from seqmodels.sequence import Sequence


class Moe(Branch):
    """Mixture of experts. Its options are declared in seqmodels/fields/moe.py."""

    experts: int = MOE["experts"]
    top_k: int = MOE["top_k"]
    hidden: int = MOE["hidden"]
    router: str = MOE["router"]
    scale: float = MOE["scale"]
    shared: int = MOE["shared"]
    shared_gate: bool = MOE["shared_gate"]
    capacity: float = MOE["capacity"]
    balance: float = MOE["balance"]
    z_loss: float = MOE["z_loss"]
    bias_rate: float = MOE["bias_rate"]

    options = MOE
    mixes_time = False
    operations = ("grouped_matmul",)
    warnings: ClassVar[Mapping[str, str]] = {
        "router_collapsed": "its router sends all tokens to the same experts; raise model.moe.balance or lower the "
        "learning rate"
    }

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
        y = run_experts(
            x, route, gate_up, down, self.implementation.get("grouped_matmul"), limit=self.limit(x.shape[1])
        )
        if self.shared:
            inner *= self.shared
            gate_up = self.matrix("shared_gate_up", (self.width, 2, inner), ("embed", None, "mlp"), normal(0.02))
            down = self.matrix("shared_down", (inner, self.width), ("mlp", "embed"), out)
            common = gated_mlp(x, (gate_up[:, 0], None), (gate_up[:, 1], None), (down, None))
            if self.shared_gate:
                weight = self.matrix("shared_gate", (self.width, 1), ("embed", None), normal(0.02))
                common *= jax.nn.sigmoid(x @ weight)
            y += common
        return y, {}

    @nn.nowrap
    def route(self, x: jax.Array, mask: jax.Array | None) -> routing.Route:
        """Experts and weights of tokens x [B, T, D], in which padding and what is dropped go nowhere."""
        weight = parameter(self, "router", (self.width, self.experts), ("embed", None), normal(0.02))
        logits = routing.router_logits(x, weight)
        if self.router == "sigmoid":
            route, probabilities = self.balanced_route(logits, mask)
        else:
            route = routing.softmax_route(logits, self.top_k, self.router == "renormalised")
            probabilities = jax.nn.softmax(logits)
        if mask is not None:
            route = routing.send_nowhere(route, mask[..., None], self.experts)
        if not self.is_initializing():
            self.report(logits, probabilities, route, mask)
        route = route._replace(weights=route.weights * self.scale)
        return self.drop(route) if self.limit(x.shape[1]) else route

    @nn.nowrap
    def balanced_route(self, logits: jax.Array, mask: jax.Array | None) -> tuple[routing.Route, jax.Array]:
        """DeepSeek-V3's route with the bias, and the sigmoids as probabilities."""
        bias = parameter(self, "router_bias", (self.experts,), (None,), zeros, decay=False, sign_step=self.bias_rate)
        route = routing.sigmoid_route(logits, bias, self.top_k)
        kept = route if mask is None else routing.send_nowhere(route, mask[..., None], self.experts)
        load = routing.load(kept.experts, self.experts).astype(jnp.float32)
        route = route._replace(weights=routing.with_load_gradient(route.weights, bias, load - load.mean()))
        scores = jax.nn.sigmoid(logits)
        return route, scores / scores.sum(-1, keepdims=True)

    @nn.nowrap
    def limit(self, length: int) -> int:
        """Most tokens that an expert takes of a row of `length` tokens; 0: no limit, as everywhere but in training."""
        if not (self.capacity and self.training):
            return 0
        return routing.expert_capacity(length, self.experts, self.top_k, self.capacity)

    @nn.nowrap
    def drop(self, route: routing.Route) -> routing.Route:
        """The route without what is beyond the capacity. The weights of what is left stay as they are."""
        kept = routing.within_capacity(route.experts, self.experts, self.limit(route.experts.shape[1]))
        sent = route.experts < self.experts
        dropped = jnp.sum(sent & ~kept) / jnp.maximum(mean_over_rows(jnp.sum(sent)), 1)
        self.sow("figures", "dropped_fraction", dropped)
        return routing.send_nowhere(route, kept, self.experts)

    @nn.nowrap
    def report(self, logits: jax.Array, probabilities: jax.Array, route: routing.Route, mask: jax.Array | None) -> None:
        """The router's losses, its figures and its logits. Without a reader they cost nothing."""
        load = mean_over_rows(routing.load(route.experts, self.experts).astype(jnp.float32))
        tokens = routing.tokens(logits, mask)
        self.sow("routing", "logits", logits)
        fractions = self.load_so_far(load, tokens)
        balance = routing.load_balance_loss(fractions, routing.token_mean(probabilities, mask))
        if self.balance:
            self.sow("losses", "balance_loss", self.balance * balance)
        if self.z_loss:
            self.sow("losses", "router_z_loss", self.z_loss * routing.z_loss(logits, mask))
        busy = jnp.maximum(load.mean(), 1 / self.experts)
        self.sow("figures", "max_load", load.max() / busy)
        self.sow("figures", "idle_experts", jnp.sum(load == 0, dtype=jnp.float32))
        self.sow("figures", "router_entropy", routing.entropy(probabilities, mask))
        if self.experts > self.top_k:
            self.sow("figures", "router_collapsed", routing.collapsed(route.experts, load, tokens))

    @nn.nowrap
    def load_so_far(self, load: jax.Array, tokens: jax.Array) -> jax.Array:
        """f [X], load / tokens, over the micro-batches of the step so far (Qiu et al. 2025, arXiv 2501.11873)."""
        if not self.is_mutable_collection("running"):
            return load / tokens
        sums = [self.variable("running", name, jnp.zeros_like, x) for name, x in (("load", load), ("tokens", tokens))]
        for variable, value in zip(sums, (load, tokens), strict=True):
            variable.value += value
        return sums[0].value / sums[1].value
