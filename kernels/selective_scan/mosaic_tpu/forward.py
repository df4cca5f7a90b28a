"""Body of the forward kernel: one chunk of time for one block of channels."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from seqmodels.kernels.selective_scan.mosaic_tpu.tiles import (
    TILE,
    fold_rows,
    forgets,
    kept,
    put,
    row,
    sigmoid,
    spread,
    store_rows,
    take_sums,
    widen,
    write_rows,
)


def kernel(x: Mapping[str, Any], out: Mapping[str, Any], scratch: Mapping[str, Any], *, softplus: bool) -> None:
    groups, tokens, width = x["u"].shape
    chunk, block = pl.program_id(1), pl.program_id(2)

    @pl.when(chunk == 0)
    def _():
        scratch["state"][block] = x["state"][...]

    @pl.when(block == 0)
    def _():
        spread(x, scratch)

    if out["start"] is not None:
        out["start"][...] = scratch["state"][block]

    def body(i, states):
        start = pl.multiple_of(i * TILE, TILE)
        tile = pl.ds(start, TILE)
        write_rows(x, scratch, tile, softplus)
        if x["weights"] is not None:
            for g in range(1, groups):
                store_rows(scratch["weights"].at[g], tile, x["weights"][g - 1, tile, :].astype(jnp.float32))
        states = list(states)
        for t in range(TILE):
            readout = 0
            for g in range(groups):
                step = row(scratch["step"].at[g], start + t)
                old = kept(states[g], forgets(step, x["reset"] is not None))
                states[g] = jnp.exp2(step * x["A"][g]) * old + row(scratch["write"].at[g], start + t) * widen(
                    scratch["B"][g, start + t], width
                )
                term = fold_rows(states[g] * widen(scratch["C"][g, start + t], width))
                weighted = x["weights"] is not None and g > 0
                readout += row(scratch["weights"].at[g], start + t) * term if weighted else term
            put(readout, scratch["readout"], t)
        y = take_sums(scratch["readout"]) + x["D"][...] * x["u"][0, tile, :].astype(jnp.float32)
        if x["z"] is not None:
            if out["ungated"] is not None:
                out["ungated"][tile, :] = y.astype(out["ungated"].dtype)
            z = x["z"][tile, :].astype(jnp.float32)
            y = y * z * sigmoid(z)
        out["y"][tile, :] = y.astype(out["y"].dtype)
        return tuple(states)

    states = tuple(scratch["state"][block, g] for g in range(groups))
    states = jax.lax.fori_loop(0, tokens // TILE, body, states)
    for g in range(groups):
        scratch["state"][block, g] = states[g]

    @pl.when(chunk == pl.num_programs(1) - 1)
    def _():
        out["state"][...] = scratch["state"][block]
