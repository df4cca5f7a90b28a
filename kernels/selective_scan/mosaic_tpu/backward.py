"""Body of the backward kernel: one chunk of time for one block of channels."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from seqmodels.kernels.selective_scan.mosaic_tpu.tiles import (
    LOG2_E,
    TILE,
    fold_lanes,
    fold_rows,
    forgets,
    kept,
    load_rows,
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
        scratch["dstate"][block] = x["dstate"][...]
        for name in ("dA", "dD", "dbias"):
            scratch[name][block] = jnp.zeros(scratch[name].shape[1:], jnp.float32)

    @pl.when(block == 0)
    def _():
        spread(x, scratch)

    def forward(i, states):
        start = pl.multiple_of(i * TILE, TILE)
        tile = pl.ds(start, TILE)
        write_rows(x, scratch, tile, softplus)
        dy = x["dy"][tile, :].astype(jnp.float32)
        if x["z"] is not None:
            z = x["z"][tile, :].astype(jnp.float32)
            gate = sigmoid(z)
            slope = gate * (1 + z * (1 - gate))
            out["z"][tile, :] = (dy * x["ungated"][tile, :].astype(jnp.float32) * slope).astype(out["z"].dtype)
            dy = dy * z * gate
        store_rows(scratch["dreadout"].at[0], tile, dy)
        for g in range(1, groups):
            weight = 1 if x["weights"] is None else x["weights"][g - 1, tile, :].astype(jnp.float32)
            store_rows(scratch["dreadout"].at[g], tile, weight * dy)
        states = list(states)
        for t in range(TILE):
            for g in range(groups):
                scratch["states"][start + t, g] = states[g]
                step = row(scratch["step"].at[g], start + t)
                old = kept(states[g], forgets(step, x["reset"] is not None))
                states[g] = jnp.exp2(step * x["A"][g]) * old + row(scratch["write"].at[g], start + t) * widen(
                    scratch["B"][g, start + t], width
                )
        return tuple(states)

    def backward(i, carry):
        start = pl.multiple_of(tokens - TILE - i * TILE, TILE)
        states, dstates, dA = (list(part) for part in carry)
        for t in reversed(range(TILE)):
            for g in range(groups):
                step, dreadout = (row(scratch[name].at[g], start + t) for name in ("step", "dreadout"))
                B, C = (widen(scratch[name][g, start + t], width) for name in "BC")
                old = scratch["states"][start + t, g]
                if x["weights"] is not None and g > 0:
                    put(fold_rows(states[g] * C), scratch["readout"].at[g], t)
                dstates[g] += dreadout * C
                scratch["dC"][g, start + t] += fold_lanes(states[g] * dreadout)
                scratch["dB"][g, start + t] += fold_lanes(dstates[g] * row(scratch["write"].at[g], start + t))
                put(fold_rows(dstates[g] * B), scratch["dwrite"].at[g], t)
                begins = forgets(step, x["reset"] is not None)
                # now the gradient of the state before the token
                dstates[g] = kept(dstates[g] * jnp.exp2(step * x["A"][g]), begins)
                dexponent = dstates[g] * kept(old, begins)
                put(fold_rows(dexponent * x["A"][g]), scratch["dstep"].at[g], t)
                dA[g] += dexponent * step
                states[g] = old
        tile = pl.ds(start, TILE)
        for g in range(groups):
            u = x["u"][g, tile, :].astype(jnp.float32)
            dwrite = take_sums(scratch["dwrite"].at[g])
            du = dwrite * scratch["dt"][g, tile, :]
            if g == 0:
                dy = load_rows(scratch["dreadout"].at[0], tile)
                du += x["D"][...] * dy
                scratch["dD"][block] += fold_rows(dy * u)
            elif x["weights"] is not None:
                dweights = load_rows(scratch["dreadout"].at[0], tile) * take_sums(scratch["readout"].at[g])
                out["weights"][g - 1, tile, :] = dweights.astype(out["weights"].dtype)
            out["u"][g, tile, :] = du.astype(out["u"].dtype)
            ddt = (take_sums(scratch["dstep"].at[g]) / LOG2_E + dwrite * u) * scratch["slope"][g, tile, :]
            out["dt"][g, tile, :] = ddt.astype(out["dt"].dtype)
            scratch["dbias"][block, g] += fold_rows(ddt)
        return tuple(states), tuple(dstates), tuple(dA)

    def of_block(ref):
        return tuple(ref[block, g] for g in range(groups))

    states = tuple(x["start"][g] for g in range(groups))
    states = jax.lax.fori_loop(0, tokens // TILE, forward, states)
    carry = (states, of_block(scratch["dstate"]), of_block(scratch["dA"]))
    _, dstates, dA = jax.lax.fori_loop(0, tokens // TILE, backward, carry)
    for g in range(groups):
        scratch["dstate"][block, g] = dstates[g]
        scratch["dA"][block, g] = dA[g]

    @pl.when(block == pl.num_programs(2) - 1)
    def _():
        out["B"][...] = jnp.sum(scratch["dB"][...], axis=-1)
        out["C"][...] = jnp.sum(scratch["dC"][...], axis=-1)

    @pl.when(chunk == pl.num_programs(1) - 1)
    def _():
        out["state"][...] = scratch["dstate"][block]
        out["A"][...] = scratch["dA"][block]
        out["D"][...] = scratch["dD"][block]
        if softplus:
            out["bias"][...] = scratch["dbias"][block]
