"""Compiles the GPU kernels of the short convolution for an H100 that need not be there; used by test_short_conv_gpu.

    MOSAIC_GPU_DUMP_PTXAS=1 python compile_short_conv_for_h100.py BxTxExW dtype documents(0|1)

Both passes, or of a few tokens a step that is given its state's memory and must need less than that besides. What the
assembler says of registers goes to the standard output. It needs jax's CUDA plug-in.
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

from seqmodels.kernels.short_conv import short_conv
from seqmodels.kernels.short_conv.few import FEW

TARGET = Path(__file__).resolve().parent / "h100.pbtxt"


def main(sizes, dtype, documents):
    target = TARGET.read_text()
    devices = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1").devices
    sharding = SingleDeviceSharding(devices[0])
    batch, length, width, taps = map(int, sizes.split("x"))

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    x = shape(batch, length, width, dtype=jnp.dtype(dtype))
    args = dict(x=x, weight=shape(taps, width), bias=shape(width), initial_state=shape(batch, taps - 1, width))
    layout = {}
    if documents == "1":
        layout = dict(segment_ids=shape(batch, length, dtype=jnp.int32))

    def both(args, layout, dy):
        y, pull = jax.vjp(lambda args: short_conv(**args, **layout, activation="silu")[0], args)
        return y, pull(dy)

    def step(state, args):
        return short_conv(**args, initial_state=state, activation="silu")

    with jax.sharding.use_abstract_mesh(Mesh(np.array(devices), ("d",)).abstract_mesh):
        if length > FEW:
            jax.jit(both).lower(args, layout, x).compile()
            return
        state = args.pop("initial_state")
        memory = jax.jit(step, donate_argnums=0).lower(state, args).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 4 * state.size > memory.temp_size_in_bytes, memory


if __name__ == "__main__":
    main(*sys.argv[1:])
