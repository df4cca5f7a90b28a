"""Compiles the GPU kernels of an operation for an H100 that need not be there; used by the tests of GPU kernels.

    MOSAIC_GPU_DUMP_PTXAS=1 python compile_for_h100.py selective_scan BxTxExN groups dtype documents(0|1)
    MOSAIC_GPU_DUMP_PTXAS=1 python compile_for_h100.py linear_attention BxTxHkxHxKxV dtype decay documents(0|1) read
    MOSAIC_GPU_DUMP_PTXAS=1 python compile_for_h100.py short_conv BxTxExW dtype documents(0|1)
    MOSAIC_GPU_DUMP_PTXAS=1 python compile_for_h100.py linear_scan BxTxD dtype documents(0|1)
    MOSAIC_GPU_DUMP_PTXAS=1 python compile_for_h100.py grouped_matmul MxKxNxX dtype
    MOSAIC_GPU_DUMP_PTXAS=1 python compile_for_h100.py hyper_connection BxTxnxD dtype
    MOSAIC_GPU_DUMP_PTXAS=1 python compile_for_h100.py attn_residual BxTxDxK dtype
    MOSAIC_GPU_DUMP_PTXAS=1 python compile_for_h100.py attention BxTxHxHkvxd dtype documents(0|1)

The gradient, or of a few tokens of the scan and the convolution a step that is given its state's memory and must need
less than that besides. What the assembler says of registers and shared memory goes to the standard output. It needs
jax's CUDA plug-in.
"""

import functools
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

from seqmodels.kernels.attention import mosaic_gpu
from seqmodels.kernels.attention.arguments import Inputs, Options, Tokens
from seqmodels.kernels.attention.masks import Mask
from seqmodels.kernels.attn_residual import attn_residual
from seqmodels.kernels.grouped_matmul import grouped_matmul
from seqmodels.kernels.hyper_connection import hyper_connection
from seqmodels.kernels.linear_attention import linear_attention
from seqmodels.kernels.linear_scan import linear_scan
from seqmodels.kernels.selective_scan import selective_scan
from seqmodels.kernels.short_conv import short_conv
from seqmodels.kernels.tuning import UNROLLED

TARGET = Path(__file__).resolve().parent / "h100.pbtxt"
DEVICES = topologies.get_topology_desc(platform="cuda", target_config=TARGET.read_text(), topology="1x1x1").devices


def array(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=SingleDeviceSharding(DEVICES[0]))


def scan(sizes, groups, dtype, documents):
    """The operation, its arguments, those of documents, and its length."""
    (batch, length, width, states), groups = map(int, sizes.split("x")), int(groups)
    low = functools.partial(array, dtype=jnp.dtype(dtype))
    args = dict(
        u=low(batch, length, groups, width),
        dt=low(batch, length, groups, width),
        A=array(groups, width, states),
        B=low(batch, length, groups, states),
        C=low(batch, length, groups, states),
        D=array(width),
        z=low(batch, length, width),
        dt_bias=array(groups, width),
        initial_state=array(batch, groups, width, states),
    )
    if groups > 1:
        args["weights"] = low(batch, length, groups - 1, width)
    return selective_scan, args, layout(batch, length, documents), length


def memory(sizes, dtype, decay, documents, read):
    batch, length, groups, heads, keys, values = map(int, sizes.split("x"))
    low = functools.partial(array, dtype=jnp.dtype(dtype))
    args = dict(
        q=low(batch, length, groups, keys),
        k=low(batch, length, groups, keys),
        v=low(batch, length, heads, values),
        initial_state=array(batch, heads, keys, values),
    )
    if decay != "none":
        args["log_decay"] = array(*dict(constant=(heads,), head=(batch, length, heads))[decay])
    return functools.partial(linear_attention, read=read), args, layout(batch, length, documents), None


def convolution(sizes, dtype, documents):
    batch, length, width, taps = map(int, sizes.split("x"))
    args = dict(
        x=array(batch, length, width, dtype=jnp.dtype(dtype)),
        weight=array(taps, width),
        bias=array(width),
        initial_state=array(batch, taps - 1, width),
    )
    documents = layout(batch, length, documents)
    documents.pop("mask", None)
    return functools.partial(short_conv, activation="silu"), args, documents, length


def diagonal(sizes, dtype, documents):
    batch, length, width = map(int, sizes.split("x"))
    args = dict(
        log_decay=array(batch, length, width),
        x=array(batch, length, width, dtype=jnp.dtype(dtype)),
        initial_state=array(batch, width),
    )
    return linear_scan, args, layout(batch, length, documents), None


def layout(batch, length, documents):
    if documents == "0":
        return {}
    return dict(segment_ids=array(batch, length, dtype=jnp.int32), mask=array(batch, length, dtype=jnp.bool))


def experts(sizes, dtype):
    rows, inner, outer, groups = map(int, sizes.split("x"))
    low, counts = functools.partial(array, dtype=jnp.dtype(dtype)), array(groups, dtype=jnp.int32)

    def product(x, w, sizes):
        return (grouped_matmul(x, w, sizes),)

    return product, dict(x=low(rows, inner), w=low(groups, inner, outer)), dict(sizes=counts), None


def softmax(sizes, dtype, documents):
    """By its kernel, which is not the choice on any platform."""
    batch, length, heads, kv_heads, width = map(int, sizes.split("x"))
    low = functools.partial(array, dtype=jnp.dtype(dtype))

    def attend(q, k, v, segment_ids=None, mask=None):
        tokens = Tokens(segment_ids=segment_ids, key_mask=mask)
        return (mosaic_gpu.attention(Inputs(q, k, v), tokens, Options(Mask(), width**-0.5)),)

    args = {name: low(batch, length, n, width) for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))}
    return attend, args, layout(batch, length, documents), None


def streams(sizes, dtype):
    batch, length, count, width = map(int, sizes.split("x"))
    low = functools.partial(array, dtype=jnp.dtype(dtype))
    args = dict(
        streams=low(batch, length, count, width),
        y=low(batch, length, width),
        weights=array(batch, length, count),
        matrix=low(count, width, 2 * count),
        scale=array(2),
        pre_bias=array(count),
        post_bias=array(count),
    )
    return functools.partial(hyper_connection, eps=1e-5, implementation="mosaic_gpu"), args, {}, None


def source(sizes, dtype):
    batch, length, width, steps = map(int, sizes.split("x"))
    low = functools.partial(array, dtype=jnp.dtype(dtype))
    args = dict(value=low(batch, length, width), mean_square=array(batch, length), vectors=low(steps, width))
    return functools.partial(attn_residual, eps=1e-5, implementation="mosaic_gpu"), args, {}, None


OPERATIONS = dict(
    selective_scan=scan,
    linear_attention=memory,
    short_conv=convolution,
    linear_scan=diagonal,
    grouped_matmul=experts,
    attention=softmax,
    hyper_connection=streams,
    attn_residual=source,
)


def main(name, *facts):
    operation, args, documents, length = OPERATIONS[name](*facts)

    def gradients(args, documents):
        def total(args):
            return sum(jnp.sum(x, dtype=jnp.float32) for x in operation(**args, **documents))

        return jax.value_and_grad(total)(args)

    def step(state, args, documents):
        return operation(**args, initial_state=state, **documents)

    with jax.sharding.use_abstract_mesh(Mesh(np.array(DEVICES), ("d",)).abstract_mesh):
        if length is None or length > UNROLLED:
            jax.jit(gradients).lower(args, documents).compile()
            return
        state = args.pop("initial_state")
        memory = jax.jit(step, donate_argnums=0).lower(state, args, documents).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 4 * state.size > memory.temp_size_in_bytes, memory


if __name__ == "__main__":
    main(*sys.argv[1:])
