"""Which keys a query sees, as a boolean mask: the rules of positions, documents and empty slots together."""

import jax
import jax.numpy as jnp

from seqmodels.kernels.attention.arguments import Side, Tokens
from seqmodels.kernels.attention.masks import Mask

ALWAYS = {"cpu": 128, "default": 1024}  # keys up to which `reached` looks at all of them, bad or not


def sees(mask: Mask, queries: Side, keys: Side) -> jax.Array | None:
    """[B or 1, T, S] bool, True where a query of one side sees a key of the other. None: every query sees every key."""
    rules = []
    if not mask.trivial:
        rules.append(mask.sees(jnp.asarray(queries.position)[:, :, None], jnp.asarray(keys.position)[:, None, :]))
    if queries.segment is not None and keys.segment is not None:
        rules.append(queries.segment[:, :, None] == keys.segment[:, None, :])
    if keys.real is not None:
        rules.append(jnp.asarray(keys.real)[:, None, :])
    if not rules:
        return None
    together = rules[0]
    for rule in rules[1:]:
        together = together & rule
    return jnp.broadcast_to(together, (together.shape[0], queries.position.shape[1], keys.position.shape[1]))


def visible(shape: tuple[int, int], mask: Mask, tokens: Tokens) -> jax.Array | None:
    """[B or 1, T, S] bool for `shape` (T, S): the whole mask. None: every query sees every key."""
    return sees(mask, tokens.queries(shape[0]), tokens.keys(shape[1]))


def reached(bad: jax.Array, queries: int, tokens: Tokens, *, mask: Mask, chunk: int = 1024) -> jax.Array:
    """[B, T] bool: whether a query sees a key that is `bad` [B, S]. Among many keys it searches only if there is one.

    Args:
        queries: T.
        chunk: keys for which it holds a mask of all queries at a time.
    """
    batch, length = bad.shape
    rows, columns = tokens.queries(queries), tokens.keys(length)

    def hit(columns, bad):
        seen = sees(mask, rows, columns)
        return jnp.any(bad[:, None, :] if seen is None else seen & bad[:, None, :], axis=-1)

    if length <= min(chunk, ALWAYS.get(jax.default_backend(), ALWAYS["default"])):
        return jnp.broadcast_to(hit(columns, bad), (batch, queries))
    everything, chunk = jax.tree.map(jnp.asarray, (columns, bad)), min(chunk, length)

    def search(found, start):
        """The last chunk begins earlier, so that all are of equal length."""
        first = jnp.minimum(start, length - chunk)
        part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, chunk, axis=1), everything)
        return found | hit(*part), None

    none, starts = jnp.zeros((batch, queries), bool), jnp.arange(0, length, chunk)
    return jax.lax.cond(jnp.any(bad), lambda: jax.lax.scan(search, none, starts)[0], lambda: none)
