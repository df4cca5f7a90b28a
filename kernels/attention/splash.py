"""Softmax attention by JAX's splash attention for TPUs, which skips blocks of the mask that no query sees.

It runs only if it is named: nobody has measured it on a TPU here. It compiles ahead of time for v5e, v5p and v6e.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.kernels.attention.arguments import Inputs, Options, Tokens
from seqmodels.kernels.attention.masks import Mask
from seqmodels.kernels.interpreter import tpu_interpreter

LANES, BLOCK = 128, 512  # tokens of the smallest and the largest block


def supports(
    platform: str,
    *,
    dtype: str = "bfloat16",
    queries: int = 128,
    keys: int = 128,
    width: int = 128,
    placed: bool = False,
    biased: bool = False,
    **facts: object,
) -> str | None:
    """Why this backend cannot serve the call; None: it can.

    Args:
        placed: positions, a key mask, or documents of the keys other than the queries' are given.
        biased: there is a bias, or there are gates.
    """
    if platform != "tpu" and not tpu_interpreter():
        return f"needs a TPU; the platform is {platform}"
    if dtype not in ("bfloat16", "float32"):
        return f"takes bfloat16 and float32, not {dtype}"
    if queries != keys or queries % LANES:
        return f"takes as many keys as queries, a multiple of {LANES}, not {queries} and {keys}"
    if width % LANES and width != 64:
        return f"takes heads of 64 channels or a multiple of {LANES}, not {width}"
    if placed:
        return "takes no positions, no masks of keys, and no documents of the keys other than the queries'"
    return "takes no biases and gates" if biased else None


def attention(inputs: Inputs, tokens: Tokens, options: Options) -> jax.Array:
    """See `kernels.attention.attention`."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    length, heads = inputs.q.shape[1:3]
    block = max(n for n in range(LANES, BLOCK + 1, LANES) if length % n == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": block for name in names}
    kernel = splash.make_splash_mha(
        _splash_mask(options.mask, length, heads),
        block_sizes=splash.BlockSizes(**sizes),
        attn_logits_soft_cap=options.softcap,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="scan",
        interpret=bool(tpu_interpreter()),  # the detailed interpreter does not take a vmapped grid
    )

    def of_row(q, k, v, ids):
        return kernel(q, k, v, segment_ids=None if ids is None else splash.SegmentIds(ids, ids))

    q, k, v = (jnp.moveaxis(x, 1, 2) for x in (options.scale * inputs.q, inputs.k, inputs.v))
    o = jax.vmap(of_row)(q.astype(inputs.q.dtype), k, v, tokens.segment_ids)
    return jnp.moveaxis(o, 2, 1)


@functools.cache
def _splash_mask(mask: Mask, length: int, heads: int) -> Any:
    """The mask as splash attention takes it, the same for all heads."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = length, length
    one: Any
    if mask.trivial:
        one = masks.FullMask(shape)
    elif mask == Mask():
        one = masks.CausalMask(shape)
    elif mask.window is not None and mask == Mask(window=mask.window):
        one = masks.LocalMask(shape, (mask.window - 1, 0), offset=0)
    else:
        one = _lazy(masks.Mask)(mask, length)
    return masks.MultiHeadMask([one] * heads)


def _lazy(base: type) -> type:
    """A class of splash attention's masks that computes blocks of a `Mask` when they are asked for."""

    @dataclasses.dataclass(frozen=True)
    class Lazy(base):  # type: ignore[misc]
        rules: Mask
        length: int

        @property
        def shape(self) -> tuple[int, int]:
            return self.length, self.length

        def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
            i, j = (np.arange(self.length, dtype=np.int32)[part] for part in block)
            return self.rules.sees(i[:, None], j[None])

    return Lazy
