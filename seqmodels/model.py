"""A model: an input, the backbone, and a head. With token input and a next-token head it is a language model."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from ml_collections import ConfigDict, FrozenConfigDict

from seqmodels import depth
from seqmodels.backbone import Backbone, branch_of, causal, plan, scanned
from seqmodels.branches import BRANCHES
from seqmodels.config import check_implementation, complete_model
from seqmodels.data.contract import ArraySpec, BatchSource, Spec, text_spec
from seqmodels.errors import UserError
from seqmodels.fields import refuse
from seqmodels.heads import HEADS, Head
from seqmodels.inputs import INPUTS, Input
from seqmodels.inputs.positions import Positions
from seqmodels.kernels import OPERATIONS
from seqmodels.layers.norm import norm_of
from seqmodels.mixers.short_conv import ShortConv
from seqmodels.pattern import names
from seqmodels.sequence import make_sequence


class SequenceModel(nn.Module):
    """Input, backbone and head; see `build_for`.

    Attributes:
        config: config.model, with vocab_size filled in.
        input_size: number of rows of the input's table, of letters of its alphabet, or of its channels.
        output_size: padded vocabulary, classes, targets or channels that the head predicts.
    """

    config: FrozenConfigDict
    input_size: int
    output_size: int

    def setup(self) -> None:
        config = self.config
        reader, predictor = self.new_input(), self.new_head()
        _attach(self, config.input, reader)
        _attach(self, config.head, predictor)
        self.reader, self.predictor = reader, predictor
        # Parameters are declared here, always in this order, because their initial values depend on the order.
        self.table = reader.table()
        predictor.declare()
        self.dropout = nn.Dropout(config.dropout)
        self.backbone = Backbone(config)
        nn.share_scope(self, self.backbone)  # no level of its own in the tree of parameters
        if config.positions != "none":
            self.positions = Positions(config.width, config.positions, config.position_table, config.embedding_std)
        if config.embedding_norm:
            self.embedding_norm = norm_of(config)

    @property
    def causal(self) -> bool:
        """Whether no hidden state depends on a later token; only then is there a state."""
        return causal(self.config) and not self.config.window_norm

    @nn.nowrap
    def new_input(self) -> Input:
        """The input, not yet part of a model."""
        config = self.config
        dtypes = dict(dtype=jnp.dtype(config.dtype), residual_dtype=jnp.dtype(config.residual_dtype))
        kind = input_of(config)
        options = {"window_norm": config.window_norm, "patch": config.patch, "observed": config.observed}
        fields = {name: value for name, value in options.items() if name in kind.__dataclass_fields__}
        return kind(config.width, self.input_size, std=config.embedding_std, **dtypes, **fields)

    @nn.nowrap
    def new_head(self) -> Head:
        """The head, not yet part of a model."""
        config, head = self.config, head_of(self.config)
        options = {
            "tied": config.tie_embeddings,
            "pool": config.pool,
            "horizon": config.horizon,
            "softcap": config.logit_softcap,
        }
        fields = {name: value for name, value in options.items() if name in head.__dataclass_fields__}
        return head(config.width, self.output_size, dtype=jnp.dtype(config.dtype), **fields)

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> dict[str, Any]:
        """The state before the first token. Call it on the module itself; it needs no parameters.

        Args:
            max_length: slots of attention caches: all tokens of a row, those that are still to come included. It may be
                left out for a model without attention, whose state has a constant size.

        Returns:
            segment [B] and position [B] int32: document of the last token, and number of its tokens so far; layers:
            states of the blocks; head: of heads that have a state. The first axis of every leaf is the batch.

        Raises:
            ValueError: the model has attention, and max_length is left out or below 1.
            UserError: the model reads whole rows.
        """
        if self.config.window_norm:
            raise UserError("config.model.window_norm=True: reads whole rows, and so has no state from piece to piece")
        layers = Backbone(self.config, parent=None).init_state(batch, max_length)
        zeros = jnp.zeros((batch,), jnp.int32)
        return dict(segment=zeros, position=zeros, layers=layers) | self._of_head(self.new_head().init_state(batch))

    @staticmethod
    def _of_head(state: dict[str, jax.Array]) -> dict[str, Any]:
        return {"head": state} if state else {}

    @nn.nowrap
    def example_input(self, length: int) -> jax.Array:
        """One row of `length` positions of the model's input, filled with zeros."""
        if input_of(self.config).ids:
            return jnp.zeros((1, length), jnp.int32)
        return jnp.zeros((1, length, self.input_size), jnp.float32)

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        state: Any = None,
        deterministic: bool = True,
        steps: jax.Array | None = None,
        observed: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Hidden states, from which the head predicts.

        Args:
            tokens: [B, T] int32, or, for an input of frames, values [B, T, C] float32.
            segment_ids: [B, T] int32, document of each token; None: one document.
            mask: [B, T] bool, False on padding.
            state: result of `init_state` or of an earlier call. None: nothing came before.
            steps: [B, T] float32, time from the token before to each; see `Sequence`. None: 1.
            observed: [B, T, C] bool, False on missing values, with `config.model.observed`. None: none is missing.

        Raises:
            UserError: steps, and a mixer that does not follow them.

        Returns:
            hidden [B, T, D] after the last norm, and the new state.
        """
        old = state or dict(segment=None, position=None, layers=None)
        gaps: dict[str, Any] = {} if observed is None else {"observed": observed}
        x = self.reader(tokens, mask, **gaps)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        mask, segment_ids = self.reader.shortened(mask, segment_ids)
        rows, length = x.shape[:2]
        if steps is not None:
            self._check_steps(steps, length)
        before = old["segment"], old["position"]
        seq, segment, position = make_sequence(
            rows, length, segment_ids, mask, *before, steps=steps, rescale=self.config.rescale
        )
        if self.config.positions != "none":
            x = x + self.positions(seq.positions, mask).astype(x.dtype)
        if self.config.embedding_norm:
            x = self.embedding_norm(x)
        x = nn.with_logical_constraint(x, ("batch", "length", None))
        x = self.dropout(x, deterministic=deterministic)
        hidden, layers = self.backbone(x, seq, old["layers"], deterministic)
        head = self.predictor.extend(old.get("head"), hidden, mask, segment_ids, old["segment"])
        return hidden, dict(segment=segment, position=position, layers=layers) | self._of_head(head)

    @nn.nowrap
    def _check_steps(self, steps, length):
        """Raise UserError for steps that the model cannot follow."""
        check_time(self.config, "steps", ("token",))
        if steps.shape[1] != length:
            raise UserError(f"steps: do not fit model.input={self.config.input!r}, which makes one step of several")

    def outputs(
        self,
        hidden: jax.Array,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        documents: int = 0,
        values: jax.Array | None = None,
        observed: jax.Array | None = None,
    ) -> jax.Array:
        """The head's predictions from hidden states: float32, in the head's shape.

        Args:
            hidden: [B, T, D].
            mask, segment_ids: as of a call.
            documents: S, for heads that predict for each document of a row.
            values, observed: [B, T, C] of the batch, whose units the predictions get.
        """
        short, segment_ids = self.reader.shortened(mask, segment_ids)
        more = dict(segment_ids=segment_ids, documents=documents) if documents else {}
        predicted = self.predictor(hidden, short, self.table, **more)
        if values is None:
            return predicted
        return self.predictor.restore(predicted, *self.reader.scale(values, mask, observed))

    def read_out(self, state: dict[str, Any]) -> jax.Array:
        """The head's predictions for the document that is open in a state: of a row that was read in pieces."""
        return self.predictor.read_out(state["head"])

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits of a next-token head: [B, T, D] to [B, T, V] float32, with V the padded vocabulary."""
        return self.predictor(hidden, None, self.table)

    def unembedding(self) -> Partial:
        """`logits` as a function with its matrix, to be called on pieces of the hidden states."""
        return self.predictor.unembedding(self.table)


class LanguageModel(SequenceModel):
    """Next-token model over a padded vocabulary: `Tokens`, the backbone and `NextToken`; see `build`."""


def input_of(config: Any) -> type[Input]:
    """Class of the input that config.model names."""
    return INPUTS[config.input]


def head_of(config: Any) -> type[Head]:
    """Class of the head that config.model names."""
    return HEADS[config.head]


def build(config: ConfigDict, vocab_size: int) -> SequenceModel:
    """The model of `config.model` for a tokenizer of `vocab_size` tokens.

    Raises:
        UserError: fields that do not fit together, before anything is compiled.
    """
    return _build(config, text_spec(1, 1, vocab_size), "next_token")


def build_for(config: ConfigDict, dataset: BatchSource) -> SequenceModel:
    """The model of `config.model` for a dataset, whose spec gives the sizes of input and head.

    Raises:
        UserError: fields that do not fit together, or not to the dataset, before anything is compiled.
    """
    return _build(config, dataset.spec, dataset.objective)


def _build(config, spec: Spec, objective: str) -> SequenceModel:
    config = complete_model(config)
    check_parts(config, spec, objective)
    reader, head = input_of(config), head_of(config)
    sizes = [_size(name, spec[name]) for name in (reader.key, head.target)]
    vocabularies = [i for i, at_root in enumerate((reader.at_root, head.at_root)) if at_root]
    if vocabularies:
        vocab_size = max(sizes[i] for i in vocabularies)
        if config.vocab_size and config.vocab_size < vocab_size:
            refuse("model.vocab_size", config.vocab_size, f"0, or at least {vocab_size}, as the tokenizer has so many")
        config.vocab_size = config.vocab_size or -(-vocab_size // config.vocab_multiple) * config.vocab_multiple
        for i in vocabularies:
            sizes[i] = config.vocab_size
    scanned(config)
    if config.positions == "learned" and not config.position_table:
        refuse("model.position_table", 0, "at least the number of tokens in a row, with model.positions='learned'")
    if config.positions == "sinusoidal" and config.width % 2:
        refuse("model.width", config.width, "even with model.positions='sinusoidal'")
    if config.bias and config.norm != "layer" and not any(BRANCHES[name].biased for name in names(config.pattern)):
        allowed = (
            f"False with model.norm={config.norm!r} and model.pattern={config.pattern!r}, where nothing has a bias"
        )
        refuse("model.bias", True, allowed)
    if config.rescale != 1:
        check_time(config, f"config.model.rescale={config.rescale}", ("rate", "token"))
    check_implementation(config.implementation)
    kind = LanguageModel if len(vocabularies) == 2 else SequenceModel
    model = kind(FrozenConfigDict(config), *sizes)
    # Both cases declare every branch, which checks the branch's fields.
    if causal(config):
        jax.eval_shape(lambda: Backbone(model.config, parent=None).init_state(1, 1))
    else:
        _check_both_ways(config, head)
    return model


def _check_both_ways(config: Any, head: type[Head]) -> None:
    """Check a model in which positions depend on later ones, and which therefore has no state."""
    if head.causal:
        allowed = " or ".join(repr(name) for name, other in HEADS.items() if not other.causal)
        refuse("model.head", config.head, f"{allowed} with model.pattern={config.pattern!r}, which reads ahead")
    for spec in plan(config):
        for word in spec.names().values():
            branch_of(config, word, parent=None)


def check_time(config: Any, wish: str, kinds: tuple[str, ...]) -> None:
    """Check that all of a model follows the time between tokens; `config` is config.model.

    Args:
        wish: what asks for it, for the message. kinds: values of `Branch.follows_time` that serve it.

    Raises: UserError that names the mixer, or the positions, that do not.
    """
    able = [name for name in BRANCHES if not BRANCHES[name].mixes_time or BRANCHES[name].follows_time in kinds]
    for name in names(config.pattern):
        if name not in able:
            mixers = ", ".join(name for name in able if BRANCHES[name].mixes_time)
            raise UserError(f"{wish}: does not fit {name!r} in model.pattern, which does not follow time; {mixers} do")
    if config.positions != "none":
        raise UserError(
            f"{wish}: does not fit model.positions={config.positions!r}, which count tokens; allowed: 'none'"
        )


def check_parts(config: ConfigDict, spec: Spec, objective: str) -> None:
    """Check that the input and head of config.model fit the batches of a dataset.

    Raises: UserError in one line with the field, its value and what is allowed.
    """
    reader, head, name = input_of(config), head_of(config), config.head
    if name != objective:
        refuse("model.head", name, f"{objective!r}, which is what the dataset is for")
    has = f"in the dataset's batches, which have {', '.join(spec)}"
    if reader.key not in spec:
        fit = " or ".join(repr(name) for name, other in INPUTS.items() if other.key in spec)
        refuse("model.input", config.input, f"{fit}; it needs {reader.key!r} {has}")
    for array in (head.target, *head.needs):
        if array not in spec:
            raise UserError(f"config.model.head={name!r}: needs {array!r} {has}")
    if config.window_norm and name not in ("window", "regress_steps"):
        refuse("model.window_norm", True, f"False with model.head={name!r}; it is for 'window' and 'regress_steps'")
    if config.window_norm and name == "regress_steps" and spec["values"].shape[-1] != spec["targets"].shape[-1]:
        refuse("model.window_norm", True, "False where the targets are not the channels of the values")
    if config.observed != ("observed" in spec):
        which = "which say what is missing" if "observed" in spec else "which do not say what is missing"
        refuse("model.observed", config.observed, f"{not config.observed} with the dataset's batches, {which}")
    if config.observed and reader.ids:
        refuse("model.input", config.input, "'frames' or 'patches' with model.observed=True")
    if config.input == "patches" and (head.causal or name == "regress_steps"):
        refuse("model.input", "patches", f"another with model.head={name!r}, which predicts at every position")
    if config.input == "patches" and (length := spec[reader.key].shape[1]) % config.patch:
        refuse("model.patch", config.patch, f"a divisor of the {length} steps of a row")
    if config.input == "patches" and "steps" in spec:
        refuse("model.input", "patches", "another where the dataset has steps, which patches would join")
    if name == "window" and (steps := spec[head.target].shape[1]) != config.horizon:
        refuse("model.horizon", config.horizon, f"{steps}, as the dataset's targets have so many steps")
    if name == "rebuild" and config.width % 2:
        refuse("model.width", config.width, "even with model.head='rebuild', whose positions are sinusoids")
    if config.tie_embeddings and name == "next_token" and not reader.at_root:
        without = f"config.model.input={config.input!r}, which has no table of tokens"
        refuse("model.tie_embeddings", True, f"False with {without}")


def _attach(model: nn.Module, name: str, part: Input | Head) -> None:
    """Make `part` a submodule. Its parameters are placed under `name`, or at the root of the tree."""
    setattr(model, name, part)
    if part.at_root:
        nn.share_scope(model, part)


def _size(name: str, array: ArraySpec) -> int:
    """Number of different ids in an array of a batch, or the size of its last axis if it holds numbers."""
    if np.issubdtype(array.dtype, np.integer) and array.count < 1:
        raise UserError(f"dataset.spec[{name!r}].count={array.count}: must be the number of different ids, at least 1")
    return array.count or array.shape[-1]


def describe_kernels(config: ConfigDict, platform: str) -> list[str]:
    """One line per operation of the model: its implementation on `platform` ("cpu", "gpu", "tpu"), and the reason."""
    branches = [BRANCHES[name] for name in names(config.pattern)]
    if config.short_conv:
        branches.append(ShortConv)
    lines = []
    used = [operation for branch in branches for operation in branch.operations]
    for operation in dict.fromkeys((*used, *depth.operations(config))):
        name, why = config.implementation[operation], f"model.implementation.{operation}"
        if not name:
            name, why = OPERATIONS[operation].choose(platform, dtype=config.dtype)
        lines.append(f"{operation}: {name} ({why})")
    return lines
