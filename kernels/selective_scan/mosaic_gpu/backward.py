"""Backward pass of the selective scan on Hopper: chunks of time from the last to the first, with states recomputed.

Let g_t be the gradient of the state after token t. For each channel and state

    g_t = exp(dt_{t+1} A) g_{t+1} + dy_t C_t,    q_t = g_t exp(dt_t A) s_{t-1}
    dC_t = sum_e dy_t s_t,    dB_t = sum_e g_t dt_t u_t                     (over channels)
    du_t = dt_t sum_n g_t B_t,    ddt_t = sum_n q_t A + u_t sum_n g_t B_t   (over states),    dA = sum_t q_t dt_t

A block of channels of one group has four warpgroups, which pass chunks to one another:
  prepare_and_sum_channels  computes dt, dt u and the gated dy in float32, some chunks ahead; sums over the block's
                            channels, which gives dB and dC of this block. The sum over blocks is taken outside the
                            kernel, in order;
  walk                      two warpgroups, each with half of the channels. They go forwards from the state that the
                            forward pass saved, then back with the states and decays of four tokens in registers; each
                            thread stores its part of the sums;
  sum_states                sums over a channel's states, which gives du, ddt, dz, dweights; copies the next chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels import lanes
from seqmodels.kernels.lanes import LOG2E
from seqmodels.kernels.selective_scan.mosaic_gpu import backward_roles as roles
from seqmodels.kernels.selective_scan.mosaic_gpu.backward_plan import AHEAD, BUFFERS, PART, SLOTS, Plan, output_shapes
from seqmodels.kernels.selective_scan.mosaic_gpu.backward_walk import walk
from seqmodels.kernels.selective_scan.mosaic_gpu.stage import Stage
from seqmodels.kernels.selective_scan.mosaic_gpu.tile import Tile

f32 = jnp.float32


@functools.partial(jax.jit, static_argnames=("softplus", "chunk"))  # traced once per shape, not per layer
def backward(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    z: jax.Array | None,
    dt_bias: jax.Array,
    weights: jax.Array | None,
    marks: jax.Array | None,
    saved: jax.Array,
    dy: jax.Array,
    dfinal: jax.Array,
    *,
    softplus: bool,
    chunk: int,
) -> dict[str, jax.Array]:
    """Gradients; arguments as for `forward`, which saved the states of every chunk.

    Args:
        saved: [b, T' / chunk or more, G E' N] float32, in the order of `Tile.saved`.
        dy: [b, T, E] in u's dtype. dfinal: [b, G, E', N] float32, gradient of the final state.
        chunk: a multiple of PART.

    Returns:
        dict of du, ddt [b, T', G, E'], dA [b, G, E', N], dBC [b, blocks, T', G, 2, N] to be summed over blocks,
        dD (from the first group only), dbias [b, parts, G, E'], dz [b, T', G, E'] to be summed over groups, dweights
        [b, T', G - 1, E'] of every group, dinitial [b, G, E', N]. du, ddt, dz, dweights have their inputs' dtypes, the
        rest is float32. Without z there is no dz, and without weights no dweights.
    """
    batch, length, groups, _ = u.shape
    readout = z is not None or weights is not None
    plan = Plan(Tile(A.shape[-1]), length, groups, A.shape[1], saved.shape[1], chunk, softplus, readout)
    block, workers = plan.block, plan.tile.workers
    arrays = dict(u=u, dt=dt, B=B, C=C, dy=dy, z=z, weights=weights, marks=marks)
    stage = Stage(arrays, chunk, block, groups=1, slots=SLOTS)
    out = output_shapes(plan, u, dt, z, weights)

    def body(*refs):
        scan = roles.bind(plan, stage, out, refs)
        pl.when(lax.axis_index("role") == 0)(lambda: roles.prepare_and_sum_channels(scan))
        walks = (lax.axis_index("role") > 0) & (lax.axis_index("role") <= workers)
        pl.when(walks)(lambda: walk(scan))
        pl.when(lax.axis_index("role") == workers + 1)(lambda: roles.sum_states(scan))

    kernel = lanes.kernel(
        body,
        out_type=tuple(out.values()),
        scratch_types=[
            *stage.scratch(),
            *[plgpu.SMEM((AHEAD, chunk, block), f32)] * 3,
            plgpu.SMEM((BUFFERS, PART, plan.row), f32),
            plgpu.Barrier(num_barriers=AHEAD),
            plgpu.Barrier(num_barriers=BUFFERS, num_arrivals=workers),
            plgpu.Barrier(num_barriers=BUFFERS, num_arrivals=2),  # both readers of the sums
            plgpu.Barrier(num_barriers=AHEAD),
        ],
        grid=(batch, groups, plan.blocks),
        grid_names=("b", "g", "e"),
        num_threads=2 + workers,
        thread_name="role",
    )
    return dict(zip(out, kernel(*stage.arrays.values(), A * LOG2E, D, dt_bias, saved, dfinal)))
