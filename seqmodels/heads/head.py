"""The contract of a head: what is predicted from hidden states, and the loss that a model is trained by."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Batch = dict[str, jax.Array]


class Sums(Protocol):
    """Sums over the items that count, so that micro-batches add up exactly. Scalars, float32, without gradient."""

    @property
    def count(self) -> jax.Array:
        """Number of items that count."""
        ...


class Head(nn.Module):
    """Base of all heads. A head declares its parameters in `setup`.

    Attributes:
        width: D, of the hidden states.
        size: size of the prediction: of the padded vocabulary, or number of classes, targets or channels.
        dtype: dtype of the matrix product.

    Class attributes:
        at_root: whether its parameters are at the root of the tree, not under the head's name.
        method: method of the model that computes the outputs for the loss.
        target: array of a batch that it is trained on. The size follows from its ids or its last axis.
        needs: other arrays that a batch must have, besides those of the input.
        causal: whether hidden states must not depend on later positions.
    """

    width: int
    size: int
    dtype: DTypeLike = jnp.float32

    at_root: ClassVar[bool] = False
    method: ClassVar[str] = "outputs"
    target: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ("mask",)
    causal: ClassVar[bool] = False

    def declare(self) -> None:
        """Declare the parameters. Without this, Flax would declare them only when the head is called."""

    def __call__(self, hidden: jax.Array, mask: jax.Array | None = None, table: jax.Array | None = None) -> jax.Array:
        """Predictions in float32.

        Args:
            hidden: [B, T, D].
            mask: [B, T] bool, False on padding; None: there is none.
            table: [size, D] of the input, for heads that are tied to it.
        """
        raise NotImplementedError

    def restore(self, predicted: jax.Array, mean: jax.Array | float, deviation: jax.Array | float) -> jax.Array:
        """Predictions [..., C] of values that were read less their mean, over their deviation, in the old units."""
        return predicted * deviation + mean

    def init_state(self, batch: int) -> dict[str, jax.Array]:
        """What the head keeps from piece to piece of a row that is read in pieces, before the first; {}: nothing."""
        return {}

    def extend(
        self,
        state: dict[str, jax.Array] | None,
        hidden: jax.Array,
        mask: jax.Array | None,
        segment_ids: jax.Array | None,
        before: jax.Array | None,
    ) -> dict[str, jax.Array]:
        """That state after one more piece.

        Args:
            state: None: nothing came before.
            hidden: [B, T, D]. mask: [B, T] bool or None. segment_ids: [B, T] int32 or None.
            before: [B] int32, document of the last position before the piece; None: nothing came before.
        """
        return {}

    def read_out(self, state: dict[str, jax.Array]) -> jax.Array:
        """Predictions in float32 from the state alone, for the document that is open. Only of heads with a state."""
        raise NotImplementedError

    @staticmethod
    def options(training: Any) -> dict[str, Any]:
        """Keyword arguments of `loss` and `figures` that `config.training` holds."""
        return {}

    @staticmethod
    def loss(
        outputs_of: Callable[..., jax.Array], hidden: jax.Array, batch: Batch, *args: Any, **options: Any
    ) -> tuple[Any, Any]:
        """The loss, summed over the items that count, and the `Sums`. The loss is differentiated.

        The gradient is divided by `sums.count` at the end. So it is the mean over the whole batch, however the batch
        was split into micro-batches.

        Args:
            outputs_of: (hidden, mask) -> predictions; the model's method `method` with these parameters. By the keyword
                `method` it calls another one.
            hidden: [B, T, D].
            batch: arrays as `dataset.spec` says.
        """
        raise NotImplementedError

    @staticmethod
    def figures(sums: Any, *args: Any, **options: Any) -> dict[str, jax.Array]:
        """The reported figures, computed from the sums; "loss" comes first."""
        raise NotImplementedError
