"""Compiles the GPU kernels of the selective scan for an H100 that need not be there; used by test_selective_scan_gpu.

    MOSAIC_GPU_DUMP_PTXAS=1 python compile_for_h100.py BxTxExN groups dtype documents(0|1)

The gradient, or of a few tokens a step that is given its state's memory and must need less than that besides. What the
assembler says of registers and shared memory goes to the standard output. It needs jax's CUDA plug-in.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from seqmodels.kernels.selective_scan import selective_scan
from seqmodels.kernels.selective_scan.xla import FEW

TARGET = Path(__file__).resolve().parent / "h100.pbtxt"


def arguments(batch, length, width, states, groups, dtype, documents, sharding):
    """Shapes of all arguments."""
    f32 = jnp.float32
    shapes = dict(
        u=((batch, length, groups, width), dtype),
        dt=((batch, length, groups, width), dtype),
        A=((groups, width, states), f32),
        B=((batch, length, groups, states), dtype),
        C=((batch, length, groups, states), dtype),
        D=((width,), f32),
        z=((batch, length, width), dtype),
        dt_bias=((groups, width), f32),
        initial_state=((batch, groups, width, states), f32),
    )
    if groups > 1:
        shapes["weights"] = ((batch, length, groups - 1, width), dtype)
    layout = {}
    if documents:
        layout = dict(segment_ids=((batch, length), jnp.int32), mask=((batch, length), jnp.bool))
    return (
        {name: jax.ShapeDtypeStruct(*x, sharding=sharding) for name, x in part.items()} for part in (shapes, layout)
    )


def main(sizes, groups, dtype, documents):
    target = TARGET.read_text()
    devices = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1").devices
    sizes = tuple(map(int, sizes.split("x")))
    args, layout = arguments(*sizes, int(groups), jnp.dtype(dtype), documents == "1", SingleDeviceSharding(devices[0]))

    def gradients(args, layout):
        return jax.grad(lambda args: sum(jnp.sum(x, dtype=jnp.float32) for x in selective_scan(**args, **layout)))(args)

    def step(state, args, layout):
        return selective_scan(**args, initial_state=state, **layout)

    with jax.sharding.use_abstract_mesh(Mesh(np.array(devices), ("d",)).abstract_mesh):
        if sizes[1] > FEW:
            jax.jit(gradients).lower(args, layout).compile()
            return
        state = args.pop("initial_state")
        memory = jax.jit(step, donate_argnums=0).lower(state, args, layout).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 4 * state.size > memory.temp_size_in_bytes, memory


if __name__ == "__main__":
    main(*sys.argv[1:])
