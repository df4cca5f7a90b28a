"""Compiles the GPU kernels of linear attention for an H100 that need not be there; used by test_linear_attention_gpu.

    MOSAIC_GPU_DUMP_PTXAS=1 python compile_linear_attention_for_h100.py BxTxHkxHxKxV dtype decay documents(0|1) read

What the assembler says of registers and shared memory goes to the standard output. It needs jax's CUDA plug-in.
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

from seqmodels.kernels.linear_attention import linear_attention

TARGET = Path(__file__).resolve().parent / "h100.pbtxt"


def main(sizes, dtype, decay, documents, read):
    target = TARGET.read_text()
    devices = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1").devices
    batch, length, groups, heads, keys, values = map(int, sizes.split("x"))

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=SingleDeviceSharding(devices[0]))

    args = dict(
        q=shape(batch, length, groups, keys, dtype=jnp.dtype(dtype)),
        k=shape(batch, length, groups, keys, dtype=jnp.dtype(dtype)),
        v=shape(batch, length, heads, values, dtype=jnp.dtype(dtype)),
        initial_state=shape(batch, heads, keys, values),
    )
    if decay != "none":
        args["log_decay"] = shape(*(dict(constant=(heads,), head=(batch, length, heads))[decay]))
    layout = {}
    if documents == "1":
        layout = dict(segment_ids=shape(batch, length, dtype=jnp.int32), mask=shape(batch, length, dtype=jnp.bool))

    def gradients(args, layout):
        def total(args):
            return sum(jnp.sum(x, dtype=jnp.float32) for x in linear_attention(**args, **layout, read=read))

        return jax.value_and_grad(total)(args)

    with jax.sharding.use_abstract_mesh(Mesh(np.array(devices), ("d",)).abstract_mesh):
        jax.jit(gradients).lower(args, layout).compile()


if __name__ == "__main__":
    main(*sys.argv[1:])
