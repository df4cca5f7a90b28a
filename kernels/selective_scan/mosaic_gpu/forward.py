"""Forward pass of the selective scan on Hopper: three to six warpgroups take a block of channels through time.

The warpgroups pass chunks of tokens on through shared memory. Each role is a function of `forward_roles`:
  prepare_steps  computes dt and dt u in float32;
  recur          runs the recurrence token by token, with some states of a channel in each thread's registers. With
                 several groups, each has a warpgroup. A single group has two warpgroups if blocks are wide, each with
                 half of the states;
  store_outputs  sums over groups, applies skip and gate, stores y, and copies the next chunk.
In shared memory 4 tokens of a channel are adjacent, so that `recur` loads and stores 16 bytes at a time.
If there are few sequences and channels, blocks are narrow: more threads then share the states of a channel.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels import lanes
from seqmodels.kernels.lanes import LOG2E
from seqmodels.kernels.selective_scan.mosaic_gpu import forward_roles
from seqmodels.kernels.selective_scan.mosaic_gpu.forward_plan import Plan, slots_of
from seqmodels.kernels.selective_scan.mosaic_gpu.stage import Stage

f32 = jnp.float32


@functools.partial(
    jax.jit, static_argnames=("softplus", "block", "chunk", "save")
)  # traced once per shape, not per layer
def forward(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    z: jax.Array | None,
    dt_bias: jax.Array,
    weights: jax.Array | None,
    initial_state: jax.Array,
    marks: jax.Array | None,
    *,
    softplus: bool,
    block: int,
    chunk: int,
    save: int,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """y, the final state, and the states at the start of every `save` tokens.

    Args:
        u, dt: [b, T, G, E] with E * itemsize a multiple of 16. z: [b, T, E] or None.
        A: [G, E', N] float32, N one of tile.SIZES, E' = E padded to whole blocks. D: [E'], dt_bias: [G, E'] float32.
        B, C: [b, T, G, N] float32. weights: [b, T, G - 1 or 1, E] or None.
        initial_state: [b, G, E', N] float32. marks: [b, T', 8], result of `stage.marks`; T' is T padded to chunks.
        softplus: dt + dt_bias goes through softplus.
        block: channels per block: 128, 64, 32 or 16, with at least 128 states in all.
        chunk: tokens per step, a multiple of save; chunk * block is 512, 1024 or 2048. save: 0 saves no states.

    Returns:
        y [b, T', E'] in u's dtype, final state [b, G, E', N] float32, states [b, T' / save, G E' N] float32
        in the order of the backward pass's threads (or None).
    """
    batch, length, groups, _ = u.shape
    _, padded, states = A.shape
    slots = slots_of(u, dt, B, C, z, weights, block, chunk)
    plan = Plan(batch, length, groups, padded, states, block, chunk, save, softplus, slots)
    BC = jnp.stack([B, C], axis=-1).reshape(*B.shape[:3], 2 * states)
    stage = Stage(dict(u=u, dt=dt, BC=BC, z=z, weights=weights, marks=marks), chunk, block, groups, slots)

    def body(*refs):
        scan = forward_roles.bind(plan, stage, refs)
        pl.when(lax.axis_index("role") == 0)(lambda: forward_roles.prepare_steps(scan))
        recurs = (lax.axis_index("role") > 0) & (lax.axis_index("role") <= plan.workers)
        pl.when(recurs)(lambda: forward_roles.recur(scan))
        pl.when(lax.axis_index("role") == plan.workers + 1)(lambda: forward_roles.store_outputs(scan))

    sds, tokens = jax.ShapeDtypeStruct, plan.steps * chunk
    out = [sds((batch, tokens, padded), u.dtype), sds((batch, groups, padded, states), f32)]
    if save:
        out.append(sds((batch, tokens // save, groups * padded * states), f32))
    kernel = lanes.kernel(
        body,
        out_type=tuple(out),
        scratch_types=[
            *stage.scratch(),
            *[plgpu.SMEM((slots, groups, chunk * block), f32)] * 2,
            plgpu.SMEM((slots, groups * plan.shares, chunk * block), f32),
            plgpu.Barrier(num_barriers=slots),
            plgpu.Barrier(num_barriers=slots, num_arrivals=plan.workers),
        ],
        grid=(batch, padded // block),
        grid_names=("b", "e"),
        num_threads=2 + plan.workers,
        thread_name="role",
    )
    y, final, *saved = kernel(*stage.arrays.values(), A * LOG2E, D, dt_bias, initial_state)
    return y, final, saved[0] if save else None
