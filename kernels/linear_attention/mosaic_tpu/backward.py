"""Body of the backward kernel: one chunk of time of one head; chunks come from the last to the first."""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.linear_attention.mosaic_tpu.decays import decays, product, row_gradients


def kernel(x, out, scratch, *, options):
    chunk, head = pl.program_id(2), pl.program_id(3)
    q, k, v, dy, state = (x[name][...] for name in ("q", "k", "v", "dy", "start"))
    factors = v.dtype

    @pl.when(chunk == 0)
    def _():
        scratch["dstate"][head] = x["dstate"][...]

    @pl.when(head == 0)
    def _():
        scratch["products"][...] = product(q, k, (1, 1), factors)
        for name in ("dproducts", "dq", "dk"):
            scratch[name][...] = jnp.zeros(scratch[name].shape, jnp.float32)

    dstate, rows = scratch["dstate"][head], x["rows"][...]
    D, seen, kept, total = decays(rows, options)
    q_, k_ = q.astype(jnp.float32), k.astype(jnp.float32)

    # through the reads of the chunk's own tokens
    scores = scratch["products"][...] * D
    dscores = product(dy, v, (1, 1), factors)
    scratch["dproducts"][...] += dscores * D
    dv = product(scores, dy, (0, 0), factors)
    exponents = dscores * scores

    # through the reads of the incoming state, and what is written into the outgoing one
    read, written = q_ * seen, k_ * kept
    dread = product(dy, state, (1, 1), factors)
    dwritten = product(v, dstate, (1, 1), factors)
    scratch["dq"][...] += dread * seen
    scratch["dk"][...] += dwritten * kept
    out["v"][...] = (dv + product(written, dstate, (1, 0), factors)).astype(out["v"].dtype)

    through = jnp.sum(jnp.sum(dstate * state, axis=1, keepdims=True), axis=0, keepdims=True) * total
    reads, writes = (jnp.sum(x, axis=1, keepdims=True) for x in (dread * read, dwritten * written))
    out["rows"][...] = row_gradients(rows, options, exponents, reads, writes, through)
    dstate = total * dstate + product(read, dy, (0, 0), factors)
    scratch["dstate"][head] = dstate

    @pl.when(chunk == pl.num_programs(2) - 1)
    def _():
        out["state"][...] = dstate

    @pl.when(head == pl.num_programs(3) - 1)
    def _():
        dproducts = scratch["dproducts"][...]
        out["q"][...] = (scratch["dq"][...] + product(dproducts, k, (1, 0), factors)).astype(out["q"].dtype)
        out["k"][...] = (scratch["dk"][...] + product(dproducts, q, (0, 0), factors)).astype(out["k"].dtype)
