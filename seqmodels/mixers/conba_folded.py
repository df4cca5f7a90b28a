"""Conba's states in folded form: the scaling depends on the token, and not on the state, so Mamba's kernel can run it.

    y_t = (s_t + F s_{t-tau} + f) (r_t * C_t),  r_t = swish(Z B_t + g)

is an approximation of the exact form, whose scaling depends on the state. B_t is the direction in which token t enters
the state. The scaling now belongs to the query r_t * C_t, and the delayed state is a second state with its own query:

    y_t = s_t (r_t * C_t) + s_{t-tau} (F^T (r_t * C_t)) + f (r_t * C_t)

s_{t-tau} obeys the recurrence of s_t with the inputs of tau tokens earlier. So both are groups of one selective scan.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from seqmodels.branch import State
from seqmodels.kernels.arrays import expand_to, shifted
from seqmodels.kernels.segments import resets
from seqmodels.kernels.short_conv.xla import final_history, tokens_in_reach
from seqmodels.mixers.conba_state import Places, Plant
from seqmodels.mixers.mamba import Readout, Stream, stack
from seqmodels.parallel import selective_scan
from seqmodels.sequence import Sequence


def init_folded(batch: int, delay: int, inner: int, state: int, rank: int) -> dict[str, jax.Array]:
    """Zeros: the state of tau tokens ago, and what the last tau tokens write into it later, oldest first."""
    sizes = dict(late_u=inner, late_delta=rank, late_B=state)
    rows = {name: jnp.zeros((batch, delay, size), jnp.float32) for name, size in sizes.items()}
    return dict(late_ssm=jnp.zeros((batch, inner, state), jnp.float32), **rows)


def read_folded(
    stream: Stream, readout: Readout, plant: Plant, seq: Sequence, old: State, implementation: str | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """y [B, T, E] float32 with the skip D u, and the new states by name; `old` has those of `init_folded` and ssm."""
    query = readout.C.astype(jnp.float32)
    if plant.Z is not None and plant.g is not None:
        query = query * jax.nn.silu(by_token(plant.Z, stream.B) + plant.g)
    late_query = by_token(plant.F.T, query)
    constant = jnp.sum(query * plant.f, axis=-1)
    if plant.delay:
        streams, rows = delayed_stream(stream, plant.delay, seq, old)
        queries = jnp.stack([query, late_query], axis=2)
    else:
        streams, rows, queries = [stream], {}, (query + late_query)[:, :, None]

    def scan(streams: list[Stream], queries: jax.Array, documents: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        arrays: dict[str, Any] = stack(streams)
        return selective_scan(
            **arrays, C=queries.astype(stream.B.dtype), D=readout.D, implementation=implementation, **documents
        )

    # dt is as large as u, and one low-rank product computes it. So the backward pass recomputes it.
    keep = jax.checkpoint_policies.save_only_these_names("scan")
    y, states = jax.checkpoint(scan, policy=keep)(streams, queries, seq.documents())
    names = ["ssm", "late_ssm"][: len(streams)]
    return y + constant[..., None], {name: states[:, i] for i, name in enumerate(names)} | rows


def by_token(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """matrix [M, N] times x [B, T, N], in float32."""
    return jnp.einsum("mn,btn->btm", matrix, x.astype(jnp.float32), precision="highest")


def delayed_stream(stream: Stream, delay: int, seq: Sequence, old: State) -> tuple[list[Stream], dict[str, jax.Array]]:
    """The stream and the same `delay` tokens later, which is zero where the document has not so many; and the new rows.

    Only real tokens count.
    """
    place, reset = Places(seq.mask), resets(**seq.documents())
    reach = None if reset is None else tokens_in_reach(place.to_front(reset), delay)
    count = None if seq.mask is None else jnp.sum(seq.mask, axis=1, dtype=jnp.int32)
    late: dict[str, Any] = {}
    rows = {}
    for name in ("u", "delta", "B"):
        x = place.to_front(getattr(stream, name))
        before = old[f"late_{name}"]
        earlier = shifted(before.astype(x.dtype), x)
        if reach is not None:
            earlier = jnp.where(expand_to(reach >= delay, x.ndim), earlier, 0)
        late[name] = place.back(earlier)
        rows[f"late_{name}"] = final_history(x, before, reach, count)
    return [stream, dataclasses.replace(stream, state=old["late_ssm"], **late)], rows
