"""The branch of experts against the layers of transformers: outputs, gradients and the pooled balance loss."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.channels.moe import Moe
from seqmodels.layers import routing
from seqmodels.sequence import make_sequence

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE  # noqa: E402
from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func  # noqa: E402

B, T, D, F, X, K = 2, 7, 8, 6, 4, 2

SIZES = dict(hidden_size=D, num_experts_per_tok=K, hidden_act="silu")
THEIRS = {
    "mixtral": lambda: MixtralSparseMoeBlock(
        eager(transformers.MixtralConfig(intermediate_size=F, num_local_experts=X, **SIZES))
    ),
    "jamba": lambda: JambaSparseMoeBlock(eager(transformers.JambaConfig(intermediate_size=F, num_experts=X, **SIZES))),
    "deepseek": lambda: DeepseekV3MoE(
        eager(
            transformers.DeepseekV3Config(
                moe_intermediate_size=F, n_routed_experts=X, n_shared_experts=2, n_group=1, topk_group=1,
                routed_scaling_factor=2.5, **SIZES,
            )
        )
    ),
}  # fmt: skip
OURS = {
    "mixtral": dict(router="renormalised"),
    "jamba": dict(router="softmax"),
    "deepseek": dict(router="sigmoid", scale=2.5, shared=2),
}


def eager(config):
    config._experts_implementation = "eager"  # their grouped product is for bfloat16 on GPUs
    return config


def perturbed(layer):
    """Every parameter and buffer normal: fresh ones may be zero, and equal experts hide which one was asked."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in [*layer.parameters(), *layer.buffers()]:
            value.copy_(0.5 * torch.randn(value.shape, generator=generator))
    return layer


def converted(tensors):
    """Our names and layouts, of their parameters or of their gradients."""
    array = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    gate_up = array["experts.gate_up_proj"].reshape(X, 2, F, D).transpose(0, 3, 1, 2)
    router = next(value for name, value in array.items() if name in ("gate.weight", "router.weight"))
    ours = dict(router=router.T, gate_up=gate_up, down=array["experts.down_proj"].transpose(0, 2, 1))
    if "shared_experts.gate_proj.weight" in array:
        gate, up, down = (array[f"shared_experts.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        ours |= dict(shared_gate_up=np.stack([gate, up], axis=1), shared_down=down)
    return ours


@pytest.mark.parametrize("name", THEIRS)
def test_layer(name):
    layer, draw = perturbed(THEIRS[name]()), np.random.default_rng(0)
    x, target = (draw.normal(size=(B, T, D)).astype(np.float32) for _ in range(2))
    given = torch.tensor(x, requires_grad=True)
    y = layer(given)
    (y * torch.tensor(target)).sum().backward()

    module = Moe(D, experts=X, top_k=K, hidden=F, **OURS[name])
    params = converted(dict(layer.named_parameters()))
    if name == "deepseek":
        params["router_bias"] = layer.gate.e_score_correction_bias.numpy()
    seq, _, _ = make_sequence(B, T)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x, seq)["params"])
    assert {k: v.shape for k, v in shapes.items()} == {k: v.shape for k, v in params.items()}

    def loss(params, x):
        y, _ = module.apply({"params": params}, x, seq)
        return jnp.sum(y * target), y

    (gradients, d_x), ours = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    np.testing.assert_allclose(ours, y.detach(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_x, given.grad, rtol=1e-4, atol=1e-4)
    wanted = converted({name: value.grad for name, value in layer.named_parameters()})
    for key, value in wanted.items():
        np.testing.assert_allclose(gradients[key], value, rtol=1e-4, atol=2e-5 * np.abs(value).max(), err_msg=key)


@pytest.mark.parametrize("masked", [False, True])
def test_pooled_balance_loss(masked):
    """In value and in gradient."""
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(3, B, T, X)).astype(np.float32)
    mask = draw.random((B, T)) < 0.7 if masked else None
    theirs = [torch.tensor(layer.reshape(-1, X), requires_grad=True) for layer in logits]
    loss = load_balancing_loss_func(tuple(theirs), X, K, None if mask is None else torch.tensor(mask))
    loss.backward()
    ours, gradient = jax.value_and_grad(lambda v: routing.pooled_load_balance_loss(list(v), K, mask))(logits)
    assert ours == pytest.approx(loss.item(), rel=1e-6)
    wanted = np.stack([layer.grad.numpy() for layer in theirs]).reshape(logits.shape)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-7)
