"""Qwen3-Next and OLMo Hybrid of transformers against ours: logits, gradients, decoding, files.

Parameters are perturbed until the logits' standard deviation is about 1. Their recurrence and their routers run in
float32 whatever the model's dtype. Where a token's second and third expert are equally likely, rounding may choose
another, so the routers' weights are large.
"""

import functools
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.configs.base import base
from seqmodels.interop.files import read_safetensors
from seqmodels.interop.huggingface import from_huggingface
from seqmodels.interop.pretrained import load, save
from seqmodels.model import build

pytestmark = pytest.mark.slow

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH, PREFILL, VOCABULARY = 10, 7, 37
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))
TOLERANCE = 1e-4

SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
    intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=5, linear_conv_kernel_dim=3,
    rms_norm_eps=1e-2,
)  # fmt: skip
MODELS = {
    "OlmoHybrid": dict(SIZES, rope_parameters=dict(rope_type="default", rope_theta=50.0)),
    "Qwen3Next": dict(
        SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, shared_expert_intermediate_size=24,
        head_dim=8, mlp_only_layers=[0],
        rope_parameters=dict(rope_type="default", rope_theta=50.0, partial_rotary_factor=0.5),
    ),
}  # fmt: skip
each = pytest.mark.parametrize("family", MODELS)


@functools.cache
def theirs(family):
    """A model with perturbed parameters, float32."""
    config = getattr(transformers, f"{family}Config")(**MODELS[family], pad_token_id=None)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if name.endswith("mlp.gate.weight") else 0.25
            parameter += torch.randn_like(parameter) * (scale if parameter.ndim > 1 else 0.1)
            if name.endswith("A_log"):
                parameter -= 2  # so that states live for longer than a token
    return model


def imported(model, gradients=False):
    """Fields of config.model, and their parameters, or the gradients of these, as ours."""
    tensors = {name: (p.grad if gradients else p.detach()).numpy() for name, p in model.named_parameters()}
    return from_huggingface(tensors, model.config.to_dict())


@functools.cache
def ours(family):
    fields, params = imported(theirs(family))
    config = base().model
    config.update(fields)
    return build(config, VOCABULARY), params


def logits(model, params, tokens, state=None):
    hidden, state = model.apply({"params": params}, jnp.asarray(tokens, jnp.int32), state=state)
    return model.apply({"params": params}, hidden, method="logits"), state


def near(got, want):
    assert np.abs(got - want).max() < TOLERANCE * want.std()


@each
def test_logits_and_gradients(family):
    their_model, (model, params) = theirs(family), ours(family)
    weights = np.random.default_rng(1).normal(size=(2, LENGTH, VOCABULARY)).astype(np.float32)
    their_model.zero_grad()
    want = their_model(torch.from_numpy(TOKENS), use_cache=False).logits
    (want * torch.from_numpy(weights)).sum().backward()
    assert 0.5 < want.std() < 10
    declared = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, declared)

    @jax.jit
    def run(params):
        got, pull = jax.vjp(lambda params: logits(model, params, TOKENS)[0], params)
        return got, *pull(weights)

    got, gradients = run(params)
    near(got, want.detach().numpy())
    expected = imported(their_model, gradients=True)[1]
    for (path, x), y in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert error < TOLERANCE, f"{jax.tree_util.keystr(path)}: {error:.2e} of the norm"


@each
def test_cached_decoding(family):
    """A prefill and single tokens, against theirs with its own cache."""
    their_model, (model, params) = theirs(family), ours(family)
    step, state = jax.jit(lambda tokens, state: logits(model, params, tokens, state)), model.init_state(2, LENGTH)
    cache, tokens = None, torch.from_numpy(TOKENS)
    for start, stop in [(0, PREFILL), *((t, t + 1) for t in range(PREFILL, LENGTH))]:
        got, state = step(TOKENS[:, start:stop], state)
        with torch.no_grad():
            out = their_model(tokens[:, start:stop], use_cache=True, past_key_values=cache)
        cache = out.past_key_values
        near(got, out.logits.numpy())


@each
def test_file_round_trip(family, tmp_path):
    """Their file is read, and ours is read by them, without a change of a single bit."""
    their_model, (model, params) = theirs(family), ours(family)
    their_model.save_pretrained(tmp_path / "theirs")
    fields, read = load(tmp_path / "theirs")
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert fields == imported(their_model)[0]
    save(tmp_path / "ours", params, model.config)
    again = type(their_model).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    for (name, x), y in zip(again.state_dict().items(), their_model.state_dict().values(), strict=True):
        np.testing.assert_array_equal(x.numpy(), y.numpy(), name)
    assert (
        from_huggingface(read_safetensors(tmp_path / "ours" / "model.safetensors"), again.config.to_dict())[0] == fields
    )
