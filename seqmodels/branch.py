"""The contract of a branch: what a block adds to the residual stream, a mixer of time or of channels."""

import dataclasses
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.typing import DTypeLike

from seqmodels.fields import Group
from seqmodels.layers.gathered import gathered
from seqmodels.layers.parameter import Init, parameter
from seqmodels.sequence import Sequence

State = Any  # a pytree of arrays whose first axis is the batch; {} where there is no state


def unchanged(x: jax.Array) -> jax.Array:
    """x."""
    return x


@dataclasses.dataclass(frozen=True)
class Links:
    """What a connection across depth (`seqmodels.depth`) gives to a branch beside its input.

    Attributes:
        inputs: [B, T, D], other normed inputs, for names among the branch's `ways`; those left out are x.
        value: called with the branch's value stream if it is `valued`; the branch goes on with the result.
    """

    inputs: Mapping[str, jax.Array] = FrozenDict()
    value: Callable[[jax.Array], jax.Array] = unchanged

    def of(self, way: str, x: jax.Array, seq: Sequence, dtype: DTypeLike) -> jax.Array:
        """The input of a way, as `real` returns it; x [B, T, D], which is real already, if there is no other."""
        return real(self.inputs[way], seq, dtype) if way in self.inputs else x


NO_LINKS = Links()


class Branch(nn.Module):
    """Base of all branches. docs/architecture.md describes the contract; tests/test_branches.py tests it.

    Attributes:
        width: D, of the input and the output.
        dtype: of matrix products and activations; parameters and states are float32.
        implementation: maps an operation to the name of its implementation in `seqmodels.kernels`. For operations left
            out, the device decides.
        layers: depth of the whole model, for the scale of fresh output projections.
        layer: number of the block in the stack, from the lowest, which is 0. None: not known, as in a scan over layers.
        bias: biases in the projections (`config.model.bias`), in branches that have them.

    Class attributes:
        options: the branch's own fields, from `config.model.<name>`, with their rules. None if it has no fields, or
            declares them only in the class.
        operations: the operations of `seqmodels.kernels` that it calls.
        mixes_time: whether an output depends on other tokens: a mixer of time. False: a mixer of channels.
        causal: whether an output depends on no later token.
        biased: whether `bias` may be True.
        follows_time: what distances of tokens in time it follows: "" only that of training; "rate" another one, the
            same for all tokens (`Sequence.rescale`); "token" one for each token (`Sequence.steps`) too. Models refuse
            what a mixer of time does not follow.
        ways: parts of the branch that can read an input of their own (`Links.inputs`); the rest, its values among it,
            reads x.
        valued: whether it has a value stream, a projection of the input that its state or its attention sums up, and
            calls `Links.value` with it. `__call__` of a branch with `ways` or `valued` takes Links after the state.
        link: how DenseSSM reads its hidden state: "vector" (as Mamba's), "matrix" (as RetNet's), "lti" (as S4's: the
            system is the same for all tokens), "" not at all.
        warnings: what it means, in words, that a figure that the branch reports is 1. A run writes it to its log.
    """

    width: int
    dtype: DTypeLike = jnp.float32
    implementation: Mapping[str, str] = FrozenDict()
    layers: int = 1
    layer: int | None = None
    bias: bool = False

    options: ClassVar[Group | None] = None
    operations: ClassVar[tuple[str, ...]] = ()
    mixes_time: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    biased: ClassVar[bool] = False
    follows_time: ClassVar[str] = ""
    ways: ClassVar[tuple[str, ...]] = ()
    valued: ClassVar[bool] = False
    link: ClassVar[str] = ""
    warnings: ClassVar[Mapping[str, str]] = FrozenDict()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.options is not None:
            self.options.validate(self, self.width)

    @property
    def redraw_every(self) -> int:
        """Training steps after which the random stream "features", used by the branch, changes; 0: never."""
        return 0

    @property
    def draws_by_row(self) -> bool:
        """Whether it draws random numbers for each row in training, of the stream "dropout"."""
        return False

    @property
    def below(self) -> float:
        """Number of blocks below, for fresh parameters that depend on it; half of the others if it is not known."""
        return (self.layers - 1) / 2 if self.layer is None else self.layer

    @property
    def training(self) -> bool:
        """Whether this is a training step: only a training step passes the random stream "dropout"."""
        return self.has_rng("dropout")

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> State:
        """The state before the first token. It needs no parameters. The first axis of every leaf is the batch.

        Args:
            max_length: tokens that a cache has room for. It may be left out where the state has a constant size.

        Raises:
            UserError: the branch has no state, because it is not causal.
            ValueError: the state is a cache, and max_length is left out or below 1.
        """
        return {}

    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the new state; `state=None` is the state before the first token.

        The T tokens are a whole sequence, a chunk of one, or a single token.
        """
        raise NotImplementedError

    @nn.nowrap
    def matrix(self, name: str, shape: Seq[int], axes: Seq[str | None], init: Init, group: str = "") -> jax.Array:
        """Declare a parameter that the branch reads in its `dtype`; see `seqmodels.layers.parameter.parameter`."""
        w = parameter(self, name, shape, axes, init, dtype=self.dtype, group=group)
        return w if "expert" in axes else gathered(w, tuple(axes))  # experts are gathered where they exchange rows

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Operations per token of the forward pass, in rows of `length` tokens, beyond two for each parameter.

        The caller counts two operations for each parameter that is not a vector and that a token uses (see
        `idle_parameters`). So this method adds the operations of scores and states.
        """
        return 0.0

    @nn.nowrap
    def idle_parameters(self) -> int:
        """Parameters, of those that are not vectors, that a token does not use: those of the experts it is not sent to.

        The branch's active parameters are all of its parameters without these.
        """
        return 0


def real(x: jax.Array, seq: Sequence, dtype: DTypeLike) -> jax.Array:
    """x [B, T, D] as `dtype`, zero on padding, which may hold anything."""
    x = x.astype(dtype)
    return x if seq.mask is None else jnp.where(seq.mask[..., None], x, 0)


def grows(branch: nn.Module, length: int) -> bool:
    """Whether the state grows with more than `length` tokens, that is, whether it is a cache of all earlier tokens."""

    def shapes(length: int) -> list[tuple[int, ...]]:
        return [x.shape for x in jax.tree.leaves(jax.eval_shape(lambda: branch.init_state(1, length)))]

    return shapes(2 * length) != shapes(length)
