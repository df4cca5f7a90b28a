"""Body of the forward kernel: one chunk of time of one head."""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.linear_attention.mosaic_tpu.decays import decays, product


def kernel(x, out, scratch, *, options):
    chunk, head = pl.program_id(2), pl.program_id(3)
    q, k, v = x["q"][...], x["k"][...], x["v"][...]
    factors = v.dtype

    @pl.when(chunk == 0)
    def _():
        scratch["state"][head] = x["state"][...]

    @pl.when(head == 0)
    def _():
        scratch["products"][...] = product(q, k, (1, 1), factors)

    state = scratch["state"][head]
    if out["start"] is not None:
        out["start"][...] = state
    D, seen, kept, total = decays(x["rows"][...], options)
    y = product(scratch["products"][...] * D, v, (1, 0), factors)
    y += product(q.astype(jnp.float32) * seen, state, (1, 0), factors)
    out["y"][...] = y.astype(out["y"].dtype)
    state = total * state + product(k.astype(jnp.float32) * kept, v, (0, 0), factors)
    scratch["state"][head] = state

    @pl.when(chunk == pl.num_programs(2) - 1)
    def _():
        out["state"][...] = state
