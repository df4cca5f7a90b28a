"""Forward pass of the selective scan on Hopper: three to six warpgroups walk a block of channels through time.

Chunks of tokens go from one to the next through shared memory; each role is a function of `forward_roles`:
  prepare_steps  dt and dt u in float32;
  recur          token by token: a thread has some states of a channel in registers. Of several groups each has a
                 warpgroup, a single one has two where blocks are wide, each with half of the states;
  store_outputs  sum over groups, skip and gate, y stored, the next chunk sent for.
In shared memory 4 tokens of a channel are side by side, so that who recurs loads and stores 16 bytes at a time.
Where there are few sequences and channels, blocks are narrow: more threads then share the states of a channel.
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
)  # traced once a shape, not once a layer
def forward(u, dt, A, B, C, D, z, dt_bias, weights, initial_state, marks, *, softplus, block, chunk, save):
    """y, the final state, and the states at the start of every `save` tokens.

    Args:
        u, dt: [b, T, G, E] with E * itemsize a multiple of 16. z: [b, T, E] or None.
        A: [G, E', N] float32, N one of tile.SIZES, E' = E padded to whole blocks. D: [E'], dt_bias: [G, E'] float32.
        B, C: [b, T, G, N] float32. weights: [b, T, G - 1 or 1, E] or None.
        initial_state: [b, G, E', N] float32. marks: [b, T', 8] of `stage.marks`, T' is T padded to whole chunks.
        softplus: dt + dt_bias goes through softplus.
        block: channels of a block: 128, 64, 32 or 16, with at least 128 states in all.
        chunk: tokens a step, a multiple of save; times block it is 512, 1024 or 2048. save: 0 saves no states.

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
