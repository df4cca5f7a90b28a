"""Flash attention as Pallas Mosaic GPU kernels, for Hopper, which visit only the tiles in which some query sees a key.

Which tiles of keys a tile of queries visits is in tables (`tables.py`): by positions, known before compilation, and
shortened by the documents of the tokens. A mask is computed inside a tile only where it is seen in part. Everything is
as in `xla.py`: an online softmax in the forward pass, scores computed again in the backward pass, factors of products
in the dtype of the activations, all else float32. No sum depends on the order in which blocks run.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.kernels import lanes
from seqmodels.kernels.arrays import mapped, pad, round_up
from seqmodels.kernels.attention.arguments import Inputs, Options, Tokens
from seqmodels.kernels.attention.mosaic_gpu import backward, forward
from seqmodels.kernels.attention.mosaic_gpu.block import Rules
from seqmodels.kernels.attention.mosaic_gpu.tables import ROWS, Documents, Given, visits
from seqmodels.kernels.interpreter import gpu_interpreter
from seqmodels.kernels.tensor_cores import SIDE

DTYPES, WIDTHS = ("bfloat16", "float16"), (64, 128)
LONGEST = 2**17  # the tables are quadratic in the number of tiles: 4 MiB at this length


def supports(
    platform: str,
    *,
    dtype: str = "bfloat16",
    queries: int = ROWS,
    keys: int = ROWS,
    width: int = 64,
    other_places: bool = False,
    scale: float = 1.0,
    block: int | None = None,
    biased: bool = False,
    capped: bool = False,
    masked: bool = False,
    window: int | None = None,
    named: bool = False,
    **facts: object,
) -> str | None:
    """Why this backend cannot serve the call; None: it can.

    Args:
        masked: there are documents, or keys that no query sees. named: the caller asked for this backend.
        other_places: keys have other positions than queries.
        block: tokens in a block of the pattern; None: there is no pattern.
        biased: there is a bias, or there are gates. capped: scores are capped.
    """
    if platform != "cuda" and not gpu_interpreter():
        return "it needs an NVIDIA GPU"
    if (capability := lanes.compute_capability() or 9) != 9:
        return f"it needs an NVIDIA GPU of compute capability 9.0 (Hopper), this one has {capability}"
    if dtype not in DTYPES:
        return f"q is {dtype}; it takes {', '.join(DTYPES)}"
    if width not in WIDTHS:
        return f"heads have {width} channels; it takes {' and '.join(map(str, WIDTHS))}"
    if queries != keys or other_places:
        return "it takes as many keys as queries, at the same positions: no caches"
    if not 0 < queries <= LONGEST:
        return f"T is {queries}; it takes 1 to {LONGEST}"
    if biased or capped:
        return "it takes no biases, gates or caps of scores"
    if block is not None and block % SIDE:
        return f"the pattern has blocks of {block} tokens; it takes multiples of {SIDE}"
    if not scale > 0:
        return f"scale is {scale}; it takes numbers greater than 0"
    if not named and not (masked or window or block):
        return "cuDNN is as fast where every query sees all keys before it, and faster at 32,768 tokens"
    return None


def attention(inputs: Inputs, tokens: Tokens, options: Options) -> jax.Array:
    """See `kernels.attention.attention`."""
    length = inputs.q.shape[1]
    whole = round_up(length, ROWS)
    q, k, v = (pad(x.astype(inputs.q.dtype), {1: whole}) for x in inputs[:3])
    given = given_of(tokens, (len(inputs.q), length), whole, options.mask.causal)
    rules = Rules(options.mask, options.scale, given.documents is not None, given.positions is not None)
    return _attend(rules, q, k, v, given)[:, :length]


def given_of(tokens: Tokens, shape: tuple[int, int], whole: int, causal: bool) -> Given:
    """Documents and positions of `whole` tokens, the last of which are padding that no real query sees.

    Args:
        shape: (B, T). whole: T with padding. causal: whether the mask is, which hides padding behind all tokens.
    """
    more = [(0, 0), (0, whole - shape[1])]
    positions = tokens.positions
    positions = None if positions is None else jnp.pad(positions.astype(jnp.int32), more, "edge")
    hidden = tokens.key_mask is not None or (whole > shape[1] and not (causal and positions is None))
    if tokens.segment_ids is None and not hidden:
        return Given(None, positions)
    queries = jnp.zeros(shape, jnp.int32) if tokens.segment_ids is None else tokens.segment_ids.astype(jnp.int32)
    keys = queries if tokens.key_segment_ids is None else tokens.key_segment_ids.astype(jnp.int32)
    nobody = None
    if hidden:
        nobody = _free(queries)
        keys = keys if tokens.key_mask is None else jnp.where(tokens.key_mask, keys, nobody)
    padded = jnp.broadcast_to(keys[:, -1:] if nobody is None else nobody, (shape[0], whole - shape[1]))
    return Given(Documents(jnp.pad(queries, more, "edge"), jnp.concatenate([keys, padded], axis=1), nobody), positions)


def _free(numbers: jax.Array) -> jax.Array:
    """[B, 1] int32: the least number from 0 on that is not among `numbers` [B, T]."""
    batch, length = numbers.shape
    at = jnp.where((numbers >= 0) & (numbers < length), numbers, length + 1)  # there is one up to `length`
    taken = jnp.zeros((batch, length + 2), bool).at[jnp.arange(batch)[:, None], at].set(True)
    return jnp.argmin(taken, axis=1, keepdims=True).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rules: Rules, q: jax.Array, k: jax.Array, v: jax.Array, given: Given) -> jax.Array:
    return _forward(rules, q, k, v, given)[0]


def _forward(rules: Rules, q: jax.Array, k: jax.Array, v: jax.Array, given: Given) -> Any:
    """o, and the logarithms of the sums of exponentials."""

    def run(q, k, v, given):
        found = visits(rules.mask, given, q.shape[1], forward.KEYS)
        return forward.forward(q, k, v, found, given, rules=rules)

    return mapped(run)(dict(q=q, k=k, v=v, given=given))


def _attend_fwd(rules, q, k, v, given):
    # a checkpoint policy that saves "scan" saves these, so they are not computed again
    o, lse = (checkpoint_name(x, "scan") for x in _forward(rules, q, k, v, given))
    return o, (q, k, v, given, o, lse)


def _attend_bwd(rules, residuals, do):
    q, k, v, given, o, lse = residuals
    delta = jnp.moveaxis(jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1), 1, 2)

    def run(given, **arrays):
        arrays = backward.Arrays(**arrays)
        _, length, _, width = arrays.q.shape
        keys = visits(rules.mask, given, length, backward.KEYS[width])
        queries = visits(rules.mask, given, length, backward.QUERIES[width], by_keys=True)
        dq = backward.queries_gradient(arrays, keys, given, rules=rules)
        return dq, *backward.keys_gradients(arrays, queries, given, rules=rules)

    arrays = dict(q=q, k=k, v=v, do=do.astype(q.dtype), lse=lse, delta=delta, given=given)
    return *mapped(run)(arrays), None


_attend.defvjp(_attend_fwd, _attend_bwd)
