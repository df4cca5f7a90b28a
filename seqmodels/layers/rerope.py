"""ReRoPE (Su 2023, kexue.fm/archives/9708): rotary distances that stop growing, or grow slower, beyond a window."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from seqmodels.kernels import attention as op
from seqmodels.kernels.attention import xla
from seqmodels.kernels.attention.apart import apart, hide
from seqmodels.kernels.attention.arguments import Inputs, Options, Tokens
from seqmodels.kernels.attention.masks import Marks, Pattern, Positions, Range
from seqmodels.kernels.attention.visible import reached
from seqmodels.layers.rope import rope
from seqmodels.layers.rope_scaling import leak


def rerope(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    trained: int,
    factor: float | None,
    frequency: np.ndarray,
    rotary: int | None = None,
    interleaved: bool = False,
    positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    implementation: str | None = None,
    **others: Any,
) -> jax.Array:
    """Causal attention of queries to keys, neither of which is rotated yet, with the rotary distance

        t - s                 for t - s < w, where w = L / 2,
        w                     beyond (ReRoPE), or
        w + (t - s - w) / k   beyond (Leaky ReRoPE), with k such that rows of `factor` L tokens have distances up to L.

    Near and far keys are two calls of attention by XLA, each with its own rotation, which are merged as the tiles of a
    call are. So memory is linear in T and S, and few tiles are visited twice.

    Args:
        q: [B, T, H, d]. k, v: [B, S, Hkv, d].
        trained: L. factor: None for ReRoPE.
        frequency: [d/2] radians a token. rotary, interleaved: as for `rope`.
        implementation: not read.
        others: as for `kernels.attention.attention`, except bias.

    Returns:
        [B, T, H, d] in the dtype of q.
    """
    if positions is None:
        positions = jnp.arange(q.shape[1], dtype=jnp.int32)[None].repeat(len(q), 0)
    rules: dict[str, Any] = dict(causal=True, window=None, sinks=0, pattern=None, scale=None, softcap=None)
    rules |= dict(bias=None, bias_weights=None, gates=None, key_gates=None, segment_ids=None, key_segment_ids=None)
    places: dict[str, Any] = dict(positions=positions, key_positions=key_positions, key_mask=key_mask)
    inputs, tokens, options = op.arguments(q, k, v, **rules | others | places)
    w = trained / 2
    slower = 0.0 if factor is None else 1 / max(leak(factor, trained, w), 1.0)
    turn = functools.partial(rope, rotary=rotary, frequency=frequency, interleaved=interleaved)

    def attend(inputs: Inputs, tokens: Tokens) -> jax.Array:
        sides = tokens.queries(q.shape[1]), tokens.keys(k.shape[1])
        # from the first query of the call on: angles of small numbers are more exact
        at, key_at = (jnp.float32(x.position - sides[0].position[:, :1]) for x in sides)

        def turned(scale: float, shift: float) -> Inputs:
            return inputs._replace(q=turn(inputs.q, scale * at + shift), k=turn(inputs.k, scale * key_at))

        both = turned(1.0, 0.0), turned(slower, w * (1 - slower))
        return _near_and_far(math.ceil(w), options, both, tokens)

    inputs = hide(inputs, key_mask)
    if tokens.segment_ids is None:
        return attend(inputs, tokens)
    return apart(attend, functools.partial(reached, mask=options.mask), inputs, tokens)


@dataclasses.dataclass(frozen=True)
class Distances(Pattern):
    """A pattern of those keys of another pattern (None: of all) that are low <= i - j < high tokens before the query.

    None: there is no such bound.
    """

    low: int | None
    high: int | None
    pattern: Pattern | None

    @property
    def block(self) -> int:
        return 1 if self.pattern is None else self.pattern.block

    def marks(self, position: Positions) -> Marks:
        return position, *(() if self.pattern is None else self.pattern.marks(position))

    def meets(self, query: Marks, key: Marks) -> Any:
        (i, *marks), (j, *key_marks) = query, key
        seen = i - j < self.high if self.low is None else i - j >= self.low
        return seen if self.pattern is None else seen & self.pattern.meets(tuple(marks), tuple(key_marks))

    def touches(self, rows: Range, columns: Range, most: int) -> Any:
        touched = rows[0] - columns[1] < self.high if self.low is None else rows[1] - columns[0] >= self.low
        return touched if self.pattern is None else touched & self.pattern.touches(rows, columns, most)


def _options(w: int, options: Options) -> tuple[Options, Options]:
    """Options of the keys at distances below w, and of the others."""
    pattern = options.mask.pattern

    def within(low: int | None, high: int | None) -> Options:
        mask = dataclasses.replace(options.mask, pattern=Distances(low, high, pattern))
        return options._replace(mask=mask)

    return within(None, w), within(w, None)


Both = tuple[Inputs, Inputs]  # as near and as far keys are seen


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _near_and_far(w: int, options: Options, inputs: Both, tokens: Tokens) -> jax.Array:
    return _forward(w, options, inputs, tokens)[0]


def _forward(w: int, options: Options, inputs: Both, tokens: Tokens) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `xla.forward`."""
    near, far = (xla.sums(o, x, tokens) for o, x in zip(_options(w, options), inputs, strict=True))
    highest, total, values = xla.merged(near, far)
    return xla.divided(values, total).astype(inputs[0].q.dtype), highest, total


def _near_and_far_fwd(w, options, inputs, tokens):
    o, highest, total = (checkpoint_name(x, "scan") for x in _forward(w, options, inputs, tokens))
    return o, (inputs, tokens, o, highest, total)


def _near_and_far_bwd(w, options, residuals, do):
    inputs, tokens, o, highest, total = residuals
    delta = jnp.sum(o.astype(total.dtype) * do.astype(total.dtype), axis=-1)
    gradients = tuple(
        xla.backward(of, x, tokens, highest, total, delta, do)
        for of, x in zip(_options(w, options), inputs, strict=True)
    )
    return jax.tree.map(lambda x, dx: dx.astype(x.dtype), inputs, gradients), None


_near_and_far.defvjp(_near_and_far_fwd, _near_and_far_bwd)
