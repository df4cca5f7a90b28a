"""Tiny language models over bytes, and the likelihood of one request alone, a token at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.data import load_tokenizer
from seqmodels.model import build
from seqmodels.training.sharding import unbox

BYTES = load_tokenizer("bytes")


def model_and_params(module, **fields):
    """A tiny model of `module`, a file of configs/, and parameters away from their initial values."""
    config = module.get_config().model.unlock()
    config.update(width=16, repeats=2)
    config.dense.bottleneck = 8
    if "attention" in config:
        config.attention.heads, config.mlp.hidden = 2, 16
    model = build(config, BYTES.vocab_size)
    params = unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    return model, jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), params)


@functools.partial(jax.jit, static_argnums=0)
def step(model, params, token, state):
    hidden, state = model.apply({"params": params}, token[None, None], state=state)
    return model.apply({"params": params}, hidden, method="logits")[0, 0], state


def alone(model, params, request):
    """(nats, greedy) of one request: the model reads it token by token, and nothing else."""
    state = model.init_state(1, 64)
    nats, greedy = 0.0, True
    for place, token in enumerate(request.tokens[:-1], 1):
        logits, state = step(model, params, jnp.int32(token), state)
        if place >= len(request.tokens) - request.scored:
            logits = np.asarray(logits, np.float64)
            largest = logits.max()
            nats += np.log(np.exp(logits - largest).sum()) + largest - logits[request.tokens[place]]
            greedy = greedy and bool(logits.argmax() == request.tokens[place])
    return nats, greedy
