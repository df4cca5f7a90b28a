"""Body of the forward kernel: one chunk of time for a few heads."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from seqmodels.kernels.linear_attention.mosaic_tpu.decays import decays, of_heads, product, selected

if TYPE_CHECKING:
    from seqmodels.kernels.linear_attention.mosaic_tpu import Options


def kernel(x: Mapping[str, Any], out: Mapping[str, Any], scratch: Mapping[str, Any], *, options: "Options") -> None:
    chunk, block = pl.program_id(2), pl.program_id(3)
    q, k = x["q"][...], x["k"][...]
    factors, heads = q.dtype, x["v"].shape[0]

    @pl.when(chunk == 0)
    def _():
        scratch["state"][block] = x["state"][...]

    @pl.when(block == 0)
    def _():
        scratch["products"][...] = product(q, k, (1, 1), factors)

    if out["start"] is not None:
        out["start"][...] = scratch["state"][block]

    def attend(head, rows, columns):
        v, state = x["v"][head], scratch["state"][block, head]
        D, seen, kept, total = decays(rows, columns, options)
        y = product(selected(scratch["products"][...], D) * D, v, (1, 0), factors)
        y += selected(product(q.astype(jnp.float32) * seen, state, (1, 0), factors), seen)
        return y, selected(state, total) * total + product(k.astype(jnp.float32) * kept, v, (0, 0), factors)

    results = [attend(head, *logs) for head, logs in enumerate(of_heads(x["rows"][...], heads))]
    for head, (y, state) in enumerate(results):
        out["y"][head] = y.astype(out["y"].dtype)
        scratch["state"][block, head] = state

    @pl.when(chunk == pl.num_programs(2) - 1)
    def _():
        out["state"][...] = scratch["state"][block]
