"""A mixer as a Flax module of its own, for models of other projects.

mixer = seqmodels.mixers.Mamba(width=64)
variables = mixer.init(key, x)                       # x [B, T, 64]
y, state = mixer.apply(variables, x)                 # a whole sequence
y, state = mixer.apply(variables, x[:, :1], state)   # goes on after it
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from seqmodels.branch import Branch, State
from seqmodels.branches import BRANCHES
from seqmodels.errors import UserError
from seqmodels.sequence import make_sequence


class Mixer(nn.Module):
    """A mixer that is called without a `Sequence`. Its parameters have the names that they have in our models."""

    branch: Branch

    def setup(self) -> None:
        nn.share_scope(self, self.branch)

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> State:
        """The state before the first token; a cache has room for `max_length` tokens."""
        return dict(segment=None, position=None, mixer=self.branch.init_state(batch, max_length))

    def __call__(
        self,
        x: jax.Array,
        state: State = None,
        *,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        steps: jax.Array | None = None,
    ) -> tuple[jax.Array, State]:
        """y [B, T, D] of x [B, T, D], and the new state.

        Args:
            state: of the tokens before, from `init_state` or an earlier call; None: there are none.
            segment_ids: [B, T] int32, document of each token; a change resets the state. None: one document.
            mask: [B, T] bool, False on padding, which changes nothing. None: all tokens are real.
            steps: [B, T] float32, time from the token before to each, 1 in training; see `Sequence`. None: 1.

        Raises:
            UserError: steps, and a mixer that has no step size.
        """
        if steps is not None and self.branch.follows_time != "token":
            raise UserError(f"steps: must be left out with {type(self.branch).__name__}, which has none for each token")
        old = state or dict(segment=None, position=None, mixer=None)
        rows, length, _ = x.shape
        before = old["segment"], old["position"]
        seq, segment, position = make_sequence(rows, length, segment_ids, mask, *before, steps)
        y, new = self.branch(x, seq, old["mixer"])
        return y, dict(segment=segment, position=position, mixer=new)


def names() -> dict[str, str]:
    """Names of the classes of mixers, and their names in patterns."""
    places = {name: BRANCHES.place(name) for name in BRANCHES}
    return {member: name for name, (module, member) in places.items() if module.startswith("seqmodels.mixers.")}


def mixer(name: str) -> Callable[..., Mixer]:
    """A function that makes a `Mixer` from the fields of a class such as "Mamba".

    Raises: AttributeError if there is no such mixer.
    """
    if name not in (there := names()):
        raise AttributeError(f"there is no mixer {name!r}; there are {', '.join(sorted(there))}")
    branch = BRANCHES[there[name]]

    def make(width: int, **fields: Any) -> Mixer:
        return Mixer(branch(width=width, parent=None, **fields))

    make.__name__, make.__doc__ = name, branch.__doc__
    return make
