"""Body of the backward kernel: one chunk of time for a few heads. Chunks are visited from the last to the first."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from seqmodels.kernels.linear_attention.mosaic_tpu.decays import (
    ROWS,
    column_gradients,
    decays,
    of_heads,
    product,
    selected,
)

if TYPE_CHECKING:
    from seqmodels.kernels.linear_attention.mosaic_tpu import Options


def kernel(x: Mapping[str, Any], out: Mapping[str, Any], scratch: Mapping[str, Any], *, options: "Options") -> None:
    chunk, block = pl.program_id(2), pl.program_id(3)
    q, k = x["q"][...], x["k"][...]
    factors, heads = q.dtype, x["v"].shape[0]
    q_, k_ = q.astype(jnp.float32), k.astype(jnp.float32)

    @pl.when(chunk == 0)
    def _():
        scratch["dstate"][block] = x["dstate"][...]

    @pl.when(block == 0)
    def _():
        scratch["products"][...] = product(q, k, (1, 1), factors)
        for name in ("dproducts", "dq", "dk"):
            scratch[name][...] = jnp.zeros(scratch[name].shape, jnp.float32)

    def gradients(head, rows, columns):
        """Gradients of v and of the incoming state, and the head's part of those of products, q, k and columns."""
        v, dy, state, dstate = x["v"][head], x["dy"][head], x["start"][head], scratch["dstate"][block, head]
        D, seen, kept, total = decays(rows, columns, options)

        # through the reads of the chunk's own tokens
        scores = selected(scratch["products"][...], D) * D
        dscores = selected(product(dy, v, (1, 1), factors), D)
        dv = product(scores, dy, (0, 0), factors)

        # through the reads of the incoming state, and through the writes into the outgoing state
        read, written = q_ * seen, k_ * kept
        dread = selected(product(dy, state, (1, 1), factors), seen)
        dwritten = selected(product(v, dstate, (1, 1), factors), kept)
        dv += selected(product(written, dstate, (1, 0), factors), kept)

        dstate = selected(dstate, total)
        through = selected(dstate * state, total)
        through = jnp.sum(jnp.sum(through, axis=1, keepdims=True), axis=0, keepdims=True) * total
        reads, writes = (jnp.sum(x, axis=1, keepdims=True) for x in (dread * read, dwritten * written))
        dcolumns = column_gradients(head, options, dscores * scores, reads, writes, through)
        dstate = total * dstate + product(read, dy, (0, 0), factors)
        return (dv, dstate), (dscores * D, dread * seen, dwritten * kept, dcolumns)

    logs = enumerate(of_heads(x["rows"][...], heads))
    shared: Any
    own, shared = zip(*[gradients(head, *both) for head, both in logs], strict=True)
    *shared, columns = (sum(parts) for parts in zip(*shared, strict=True))
    rows = columns.T
    for head, (dv, dstate) in enumerate(own):
        out["v"][head] = dv.astype(out["v"].dtype)
        out["rows"][head] = rows[head * ROWS : (head + 1) * ROWS]
        scratch["dstate"][block, head] = dstate
    for name, part in zip(("dproducts", "dq", "dk"), shared, strict=True):
        scratch[name][...] += part

    @pl.when(chunk == pl.num_programs(2) - 1)
    def _():
        out["state"][...] = scratch["dstate"][block]

    @pl.when(block == pl.num_programs(3) - 1)
    def _():
        dproducts = scratch["dproducts"][...]
        out["q"][...] = (scratch["dq"][...] + product(dproducts, k, (1, 0), factors)).astype(out["q"].dtype)
        out["k"][...] = (scratch["dk"][...] + product(dproducts, q, (0, 0), factors)).astype(out["k"].dtype)
