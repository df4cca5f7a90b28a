"""Keeps infinity and NaN of one document from the others: what chunked recurrences do before their matrix products."""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from seqmodels.kernels.finite import finite_or_zero, not_finite, spoilt_so_far


class Spoilt(NamedTuple):
    """What depends on numbers that are not finite, [B, T] bool each.

    Attributes:
        writes: the state after a token, by what the tokens of its document up to it write.
        reads: the output of a token, by that or by its own query.
    """

    writes: jax.Array
    reads: jax.Array


def isolate(
    q: jax.Array, writes: Sequence[jax.Array], log_decay: jax.Array | None, reset: jax.Array | None
) -> tuple[jax.Array, list[jax.Array], jax.Array | None, Spoilt | None]:
    """Make the arguments of a chunked implementation finite, and say which results must then be made NaN.

    What is not finite is not written, and the results that depend on it are spoilt. A single token that is not finite
    would otherwise reach all documents of its chunk.

    Args:
        q: [B, T, ...], what reads the state.
        writes: arrays [B, T, ...] that change the state, such as keys and values.
        log_decay: [B, T, ...], or [H] (which is left as it is), or None.
        reset: [B, T] bool, where documents begin. None: there is one document, and nothing is changed.
    """
    if reset is None:
        return q, list(writes), log_decay, None
    bad = not_finite(writes[0])
    for x in writes[1:]:
        bad |= not_finite(x)
    if log_decay is not None and log_decay.ndim > 1:
        bad |= not_finite(log_decay)
        log_decay = finite_or_zero(log_decay)
    spoilt = spoilt_so_far(bad, reset)
    q_bad = not_finite(q)
    return finite_or_zero(q), [finite_or_zero(x) for x in writes], log_decay, Spoilt(spoilt, spoilt | q_bad)
