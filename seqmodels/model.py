"""The language model: embedding, backbone, and the head that predicts the next token."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict

import seqmodels.kernels.attention
import seqmodels.kernels.linear_attention
import seqmodels.kernels.selective_scan
import seqmodels.kernels.short_conv
from seqmodels.backbone import Backbone, causal, scanned
from seqmodels.branches import BRANCHES
from seqmodels.config import complete_model
from seqmodels.errors import UserError
from seqmodels.fields import refuse
from seqmodels.layers.matmul import wide_matmul
from seqmodels.layers.parameter import normal, parameter
from seqmodels.pattern import names
from seqmodels.sequence import make_sequence

OPERATIONS = {
    "selective_scan": seqmodels.kernels.selective_scan,
    "short_conv": seqmodels.kernels.short_conv,
    "attention": seqmodels.kernels.attention,
    "linear_attention": seqmodels.kernels.linear_attention,
}


class LanguageModel(nn.Module):
    """Next-token model over a padded vocabulary. `config` is config.model, with vocab_size filled in; see `build`."""

    config: FrozenConfigDict

    def setup(self):
        config = self.config
        shape, std = (config.vocab_size, config.width), config.embedding_std
        self.embedding = parameter(self, "embedding", shape, ("vocab", "embed"), normal(std), group="embedding")
        if not config.tie_embeddings:
            init, axes = normal(config.width**-0.5), ("embed", "vocab")
            self.head = parameter(self, "head", shape[::-1], axes, init, dtype=config.dtype, group="head")
        self.dropout = nn.Dropout(config.dropout)
        self.backbone = Backbone(config)
        nn.share_scope(self, self.backbone)  # no level of its own in the tree of parameters

    @nn.nowrap
    def init_state(self, batch: int, max_length: int = 0):
        """The state before the first token; call it on the module itself, it needs no parameters.

        Args:
            max_length: slots of attention caches, in tokens; other mixers' states are constant in size.

        Returns:
            segment [B] and position [B] int32: document of the last token and tokens of it so far; layers: states of
            the blocks. Every leaf has batch first.
        """
        layers = Backbone(self.config, parent=None).init_state(batch, max_length)
        zeros = jnp.zeros((batch,), jnp.int32)
        return dict(segment=zeros, position=zeros, layers=layers)

    def __call__(self, tokens, segment_ids=None, mask=None, state=None, deterministic: bool = True):
        """Hidden states, of which `logits` predicts the token after each.

        Args:
            tokens: [B, T] int32.
            segment_ids: [B, T] int32, document of each token; None: one document.
            mask: [B, T] bool, False on padding.
            state: of `init_state` or an earlier call; None: nothing came before.

        Returns:
            hidden [B, T, D] after the last norm, and the new state.
        """
        config = self.config
        old = state or dict(segment=None, position=None, layers=None)
        seq, segment, position = make_sequence(*tokens.shape, segment_ids, mask, old["segment"], old["position"])
        x = jnp.take(self.embedding, tokens, axis=0).astype(config.residual_dtype)
        x = nn.with_logical_constraint(x, ("batch", "length", None))
        x = self.dropout(x, deterministic=deterministic)
        hidden, layers = self.backbone(x, seq, old["layers"], deterministic)
        return hidden, dict(segment=segment, position=position, layers=layers)

    def logits(self, hidden):
        """[B, T, D] to [B, T, V] float32, V the padded vocabulary."""
        head = self.embedding.T if self.config.tie_embeddings else self.head
        dtype = jnp.dtype(self.config.dtype)
        return wide_matmul(hidden.astype(dtype), head.astype(dtype))


def build(config: ConfigDict, vocab_size: int) -> LanguageModel:
    """The model of `config.model` for a tokenizer of `vocab_size` tokens.

    Raises:
        UserError: fields that do not fit together, before anything is compiled.
    """
    config = complete_model(config)
    if config.vocab_size and config.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size is {config.vocab_size}; the tokenizer has {vocab_size} tokens (0 follows it)"
        )
    config.vocab_size = config.vocab_size or -(-vocab_size // config.vocab_multiple) * config.vocab_multiple
    scanned(config)
    for operation, name in config.implementation.items():
        if name and name not in OPERATIONS[operation].IMPLEMENTATIONS:
            allowed = ", ".join(map(repr, OPERATIONS[operation].IMPLEMENTATIONS))
            raise UserError(f"config.model.implementation.{operation}={name!r}: must be '' or one of {allowed}")
    model = LanguageModel(FrozenConfigDict(config))
    if not causal(config):
        refuse("model.pattern", config.pattern, "without a branch in both directions where the next token is predicted")
    jax.eval_shape(lambda: model.init_state(1, 1))  # declares every module, which checks its fields
    return model


def describe_kernels(config: ConfigDict, platform: str) -> list[str]:
    """One line an operation of the model: the implementation it runs on `platform` ("cpu", "gpu", "tpu"), and why."""
    branches = [BRANCHES[name] for name in names(config.pattern)]
    lines = []
    for operation in dict.fromkeys(operation for branch in branches for operation in branch.operations):
        name, why = config.implementation[operation], f"model.implementation.{operation}"
        if not name:
            name, why = OPERATIONS[operation].choose(platform, dtype=config.dtype)
        lines.append(f"{operation}: {name} ({why})")
    return lines
