"""A model of transformers beside ours."""

import jax.numpy as jnp

from seqmodels.configs.base import base
from seqmodels.model import build


def arrays(model, gradients=False):
    """Their tensors under the names in memory, where all experts of a layer are one tensor."""
    tensors = {name: p.grad if gradients else p.detach() for name, p in model.named_parameters()}
    return {name: tensor.numpy().copy() for name, tensor in tensors.items()}


def ours_of(fields):
    """Our model for the fields that a converter gave."""
    config = base().model
    config.update(fields)
    return build(config, fields["vocab_size"])


def logits(model, params, tokens, state=None, mask=None):
    """Our logits, and the state behind the tokens."""
    hidden, state = model.apply({"params": params}, jnp.asarray(tokens, jnp.int32), None, mask, state)
    return model.apply({"params": params}, hidden, method="logits"), state
