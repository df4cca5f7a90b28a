"""RWKV-4: transformers' RwkvForCausalLM at batch 1 (its cached step broadcasts wrongly over rows), and float64 sums.

Parameters are perturbed until the logits' standard deviation is about 1. Theirs run in float64, but for their sums,
which are float32. Measured: logits, states and gradients differ by at most 3e-6 of their norm.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.configs import rwkv
from seqmodels.configs.base import base
from seqmodels.layers.norm import layer_norm
from seqmodels.mixers.wkv import empty, wkv
from seqmodels.model import build

B, T, E = 2, 13, 3


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def near(ours, theirs, tolerance=1e-5):
    for (path, x), want in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        error = np.linalg.norm(np.asarray(x, np.float64) - want) / np.linalg.norm(want)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"


# The sums


def explicit(k, v, w, u):
    """y [B, T, E] in float64, every weight from its definition (eq. 14), divided by the largest."""
    y = np.zeros_like(v)
    for t in range(k.shape[1]):
        exponents = k[:, : t + 1] - w * (t - 1 - np.arange(t + 1))[:, None]
        exponents[:, t] = k[:, t] + u
        weights = np.exp(exponents - exponents.max(1, keepdims=True))
        y[:, t] = (weights * v[:, : t + 1]).sum(1) / weights.sum(1)
    return y


@functools.partial(jax.jit, static_argnames="chunk")
def fresh(k, v, w, u, chunk):
    return wkv(k, v, -w, u, empty({name: k[:, 0] for name in ("num", "den", "max")}), chunk=chunk)


@pytest.mark.parametrize("scale", [1.0, 200.0], ids=["moderate", "beyond the range of exp"])
def test_sums_are_their_definition(scale):
    """In chunks of any size; float32 keeps exponents of hundreds to 2e-5."""
    k, v, w, u = scale * draw(B, T, E), draw(B, T, E, seed=1), np.array([0.01, 0.5, 8.0]), draw(E, seed=2)
    arrays = [jnp.asarray(x, jnp.float32) for x in (k, v, w, u)]
    want = explicit(*(np.asarray(x, np.float64) for x in arrays))
    ys, states = zip(*(fresh(*arrays, chunk=chunk) for chunk in (4, 64)), strict=True)
    for y in ys:
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=2e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *states)


# transformers

VOCABULARY, LENGTH, PREFILL = 37, 17, 5
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (1, LENGTH))
PLACES = {  # of a matrix or vector of a block: their name, ours
    **{f"attention.{name}.weight": ("mixer", f"{name}_proj") for name in ("key", "value", "receptance")},
    **{f"attention.time_mix_{name}": ("mixer", f"mix_{name}") for name in ("key", "value", "receptance")},
    **{f"feed_forward.{name}.weight": ("mlp", f"{name}_proj") for name in ("key", "value", "receptance")},
    **{f"feed_forward.time_mix_{name}": ("mlp", f"mix_{name}") for name in ("key", "receptance")},
    **{"attention.output.weight": ("mixer", "out_proj"), "attention.time_decay": ("mixer", "decay")},
    **{"attention.time_first": ("mixer", "bonus"), "ln1.weight": ("norm", "scale"), "ln1.bias": ("norm", "bias")},
    **{"ln2.weight": ("mlp_norm", "scale"), "ln2.bias": ("mlp_norm", "bias")},
}
NORM = ("rwkv.blocks.0.pre_ln.weight", "rwkv.blocks.0.pre_ln.bias")


def transformers_model(**sizes):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.RwkvForCausalLM(transformers.RwkvConfig(vocab_size=VOCABULARY, rescale_every=0, **sizes))


@functools.cache
def theirs():
    """A float64 model of theirs with perturbed parameters."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = transformers_model(hidden_size=16, num_hidden_layers=2, intermediate_size=24).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * (0.25 if parameter.squeeze().ndim > 1 else 0.1)
    return model


def arrays(model, gradients=False):
    return {name: (p.grad if gradients else p.detach()).numpy() for name, p in model.named_parameters()}


def params_of(tensors):
    """Our parameters but the embedding, which is theirs behind their first norm."""
    params = dict(head=tensors["head.weight"].T)
    params["final_norm"] = dict(scale=tensors["rwkv.ln_out.weight"], bias=tensors["rwkv.ln_out.bias"])
    for block in range(2):
        at = params[f"block_{block}"] = {}
        for name, (branch, parameter) in PLACES.items():
            tensor = tensors[f"rwkv.blocks.{block}.{name}"]
            at.setdefault(branch, {})[parameter] = tensor.T if tensor.ndim == 2 else tensor.reshape(-1)
    return params


@functools.cache
def ours():
    config = base().model
    fields = dict(pattern="rwkv+rwkv_channel", norm="layer", bias=True, width=16, repeats=2, tie_embeddings=False)
    config.update(fields, vocab_size=VOCABULARY, rwkv=dict(), rwkv_channel=dict(hidden=24))
    return build(config, VOCABULARY)


def logits(params, first, tokens, state=None):
    """`first`: their embedding, and scale and bias of the norm behind it."""
    params = {"params": dict(params, embedding=layer_norm(*first))}
    hidden, state = ours().apply(params, jnp.asarray(tokens, jnp.int32), state=state)
    return ours().apply(params, hidden, method="logits"), state


def float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def first_of(tensors):
    return [tensors[name] for name in ("rwkv.embeddings.weight", *NORM)]


@pytest.mark.slow
def test_logits_and_gradients_are_those_of_transformers():
    model, weights = theirs(), draw(1, LENGTH, VOCABULARY, seed=1)
    torch = pytest.importorskip("torch")
    model.zero_grad()
    want = model(torch.from_numpy(TOKENS), use_cache=False).logits
    (want * torch.from_numpy(weights)).sum().backward()
    assert 0.5 < want.std() < 10
    tensors, gradients = arrays(model), arrays(model, gradients=True)

    @jax.jit
    def run(params, first):
        got, pull = jax.vjp(lambda *args: logits(*args, TOKENS)[0], params, first)
        return got, pull(jnp.asarray(weights, jnp.float32))

    got = run(float32(params_of(tensors)), float32(first_of(tensors)))
    near(got, (want.detach().numpy(), (params_of(gradients), first_of(gradients))))


@pytest.mark.slow
def test_decoding_is_that_of_transformers():
    """A prefill in two pieces and single tokens: logits, and the sums of the last state."""
    model, tensors = theirs(), arrays(theirs())
    torch = pytest.importorskip("torch")
    params, first = float32(params_of(tensors)), float32(first_of(tensors))
    step = jax.jit(lambda tokens, state: logits(params, first, tokens, state))
    cache, state = None, ours().init_state(1)
    pieces = [(0, 3), (3, PREFILL), *((t, t + 1) for t in range(PREFILL, LENGTH))]
    for start, stop in pieces:
        got, state = step(TOKENS[:, start:stop], state)
        with torch.no_grad():
            out = model(torch.from_numpy(TOKENS[:, start:stop]), state=cache, use_cache=True)
        cache = out.state
        near(got, out.logits.numpy())
    for block in range(2):
        layer = state["layers"][f"block_{block}"]
        mine = [layer["mlp"][:, 0], layer["mixer"]["shift"][:, 0], *(layer["mixer"][n] for n in ("num", "den", "max"))]
        near(mine, [s[:, :, block].numpy() for s in cache])


@pytest.mark.slow
def test_a_fresh_model_is_that_of_transformers_by_depth():
    """The vectors of every block. Theirs has `ones_like` in place of `ones` for the bonus, which makes it 1.

    Their matrices are drawn; ours are those of the authors' code, most of them zero.
    """
    config = rwkv.get_config().model
    config.update(width=24, repeats=3)
    params = build(config, VOCABULARY).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    model = transformers_model(hidden_size=24, num_hidden_layers=3)
    tensors = arrays(model)
    for block in range(3):
        for name, (branch, parameter) in PLACES.items():
            if "time_" in name and name != "attention.time_first":
                got = params[f"block_{block}"][branch][parameter].value
                want = tensors[f"rwkv.blocks.{block}.{name}"].reshape(-1)
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=f"{block} {name}")
        bonus = np.log(0.3) + 0.5 * np.tile([0, 1, -1], 8)
        np.testing.assert_allclose(params[f"block_{block}"]["mixer"]["bonus"].value, bonus, rtol=1e-6)


@pytest.mark.slow
def test_published_sizes():
    """Theirs have the norm behind the embedding in addition."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    for name in ("169m", "430m"):
        width, layers, _ = rwkv.PUBLISHED[name]
        config = transformers.RwkvConfig(hidden_size=width, num_hidden_layers=layers)
        with torch.device("meta"):
            count = sum(p.numel() for p in transformers.RwkvForCausalLM(config).parameters())
        model = build(rwkv.get_config(name).model, 257)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
        assert sum(x.size for x in jax.tree.leaves(shapes)) == count - 2 * width, name
