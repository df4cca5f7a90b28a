"""A small recurrent language model for the tests of training, with the contract of docs/architecture.md."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.tree_util import Partial

from seqmodels.configs.base import base
from tests.overrides import with_fields


class LeakyModel(nn.Module):
    """Tokens -> h_t = decay h_{t-1} + tanh(x_t W), reset where the segment changes; logits from the tied table."""

    vocab_size: int = 32
    width: int = 16
    dropout: float = 0.0

    causal: ClassVar[bool] = True

    def setup(self):
        boxed = nn.with_logical_partitioning
        normal = nn.initializers.normal(0.3)
        self.table = self.param("table", boxed(normal, ("vocab", "embed")), (self.vocab_size, self.width))
        self.kernel = self.param("kernel", boxed(normal, ("embed", "inner")), (self.width, self.width))
        self.out = self.param("out", boxed(normal, ("inner", "embed")), (self.width, self.width))
        self.scale = self.param("scale", boxed(nn.initializers.ones, ("embed",)), (self.width,))
        self.drop = nn.Dropout(self.dropout)

    def init_state(self, batch, max_length):
        return {"segment": jnp.full((batch,), -1, jnp.int32), "layers": jnp.zeros((batch, self.width))}

    def example_input(self, length):
        return jnp.zeros((1, length), jnp.int32)

    def __call__(self, tokens, segment_ids=None, mask=None, state=None, deterministic=True):
        state = self.init_state(tokens.shape[0], 0) if state is None else state
        ids = jnp.zeros_like(tokens) if segment_ids is None else segment_ids
        x = self.table[tokens]
        before = jnp.concatenate([state["segment"][:, None], ids[:, :-1]], axis=1)
        keep = 0.9 * (ids == before)

        def step(h, inputs):
            k, u = inputs
            h = k[:, None] * h + u
            return h, h

        inputs = keep.swapaxes(0, 1), jnp.tanh(x @ self.kernel).swapaxes(0, 1)
        last, hidden = jax.lax.scan(step, state["layers"], inputs)
        hidden = self.drop(hidden.swapaxes(0, 1), deterministic=deterministic)
        return self.scale * (x + hidden @ self.out), {"segment": ids[:, -1], "layers": last}

    def logits(self, hidden):
        return hidden @ self.table.T

    def unembedding(self):
        return Partial(lambda table, hidden: hidden @ table.T, self.table)


def small_config(**overrides):
    """base() at a size that compiles in a second; overrides are dotted names with __ for the dot."""
    config = base()
    config.steps, config.batch_size, config.seq_len = 6, 8, 12
    config.optimizer.learning_rate = 0.05
    config.mesh.data = 1
    return with_fields(config, overrides)


def random_batch(step, config, vocab_size=32):
    """Rows of random tokens with a change of document in the middle of some."""
    rng = np.random.default_rng(step)
    rows = rng.integers(0, vocab_size, (config.batch_size, config.seq_len + 1)).astype(np.int32)
    cut = rng.integers(0, config.seq_len, (config.batch_size, 1))
    segments = (np.arange(config.seq_len) >= cut).astype(np.int32)
    return {"tokens": rows[:, :-1], "targets": rows[:, 1:], "segment_ids": segments}
