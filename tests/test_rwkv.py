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
from seqmodels.interop.huggingface import from_huggingface
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
VECTORS = dict(mixer=("mix_key", "mix_value", "mix_receptance", "decay"), mlp=("mix_key", "mix_receptance"))


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


def imported(model, gradients=False):
    """Fields of config.model, and their parameters, or the gradients of these, as ours."""
    tensors = {name: (p.grad if gradients else p.detach()).numpy() for name, p in model.named_parameters()}
    return from_huggingface(tensors, model.config.to_dict())


@functools.cache
def ours():
    fields, params = imported(theirs())
    config = base().model
    config.update(fields)
    return build(config, VOCABULARY), params


def logits(params, tokens, state=None):
    model, _ = ours()
    hidden, state = model.apply({"params": params}, jnp.asarray(tokens, jnp.int32), state=state)
    return model.apply({"params": params}, hidden, method="logits"), state


@pytest.mark.slow
def test_logits_and_gradients_are_those_of_transformers():
    model, weights = theirs(), draw(1, LENGTH, VOCABULARY, seed=1)
    torch = pytest.importorskip("torch")
    model.zero_grad()
    want = model(torch.from_numpy(TOKENS), use_cache=False).logits
    (want * torch.from_numpy(weights)).sum().backward()
    assert 0.5 < want.std() < 10

    @jax.jit
    def run(params):
        got, pull = jax.vjp(lambda params: logits(params, TOKENS)[0], params)
        return got, *pull(jnp.asarray(weights, jnp.float32))

    near(run(ours()[1]), (want.detach().numpy(), imported(model, gradients=True)[1]))


@pytest.mark.slow
def test_decoding_is_that_of_transformers():
    """A prefill in two pieces and single tokens: logits, and the sums of the last state."""
    model, torch = theirs(), pytest.importorskip("torch")
    step = jax.jit(lambda tokens, state: logits(ours()[1], tokens, state))
    cache, state = None, ours()[0].init_state(1)
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
    _, want = imported(transformers_model(hidden_size=24, num_hidden_layers=3))
    bonus = np.log(0.3) + 0.5 * np.tile([0, 1, -1], 8)
    for block in (f"block_{i}" for i in range(3)):
        for branch, names in VECTORS.items():
            for name in names:
                got = params[block][branch][name].value
                np.testing.assert_allclose(
                    got, want[block][branch][name], rtol=1e-5, atol=1e-6, err_msg=f"{block} {name}"
                )
        np.testing.assert_allclose(params[block]["mixer"]["bonus"].value, bonus, rtol=1e-6)


@pytest.mark.slow
def test_published_sizes():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    for name in ("169m", "430m"):
        width, layers, _ = rwkv.PUBLISHED[name]
        config = transformers.RwkvConfig(hidden_size=width, num_hidden_layers=layers)
        with torch.device("meta"):
            count = sum(p.numel() for p in transformers.RwkvForCausalLM(config).parameters())
        model = build(rwkv.get_config(name).model, 257)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
        assert sum(x.size for x in jax.tree.leaves(shapes)) == count, name
