"""Keeps infinity and NaN of one document from the others: what the chunked implementations do before their products."""

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
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array | None, reset: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, Spoilt | None]:
    """Make the arguments of a chunked implementation finite, and say which results must then be made NaN.

    A write is a key, a value and a decay. One that is not finite is not made, and the results that depend on it are
    spoilt. A single token that is not finite would otherwise reach all documents of its chunk.

    Args:
        q, k, v, log_decay: as of `kernels.linear_attention.linear_attention`.
        reset: [B, T] bool, where documents begin. None: there is one document, and nothing is changed.
    """
    if reset is None:
        return q, k, v, log_decay, None
    bad = not_finite(k) | not_finite(v)
    if log_decay is not None and log_decay.ndim > 1:
        bad |= not_finite(log_decay)
        log_decay = finite_or_zero(log_decay)
    writes = spoilt_so_far(bad, reset)
    q_bad = not_finite(q)
    return finite_or_zero(q), finite_or_zero(k), finite_or_zero(v), log_decay, Spoilt(writes, writes | q_bad)
