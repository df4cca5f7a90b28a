"""The short convolution with time split over devices equals the whole, in value and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from seqmodels.kernels.short_conv import sharded, short_conv
from tests.kernels.helpers import assert_close, poisoned
from tests.kernels.inputs import short_conv_inputs
from tests.kernels.split_time import LENGTH, PIECES, SPLITS, moved, tpu_mesh

BATCH, WIDTH = 2, 3
TIME = P("data", "sequence")
SPECS = dict(x=TIME, segment_ids=TIME, mask=TIME, weight=P(), bias=P())
SPECS |= dict(initial_state=P("data"), initial_segment=P("data"))

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


def inputs(taps):
    return short_conv_inputs(taps, length=LENGTH, batch=BATCH, width=WIDTH)


def mesh():
    return jax.make_mesh((2, PIECES), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)


def split(args, static, mesh):
    """The convolution in pieces of time, rows over the other axis."""
    conv = functools.partial(sharded.short_conv, axis="sequence", activation="silu", implementation="xla")
    together = args | static
    specs = {name: SPECS[name] for name in together}
    out = (TIME, P("data"))
    return jax.shard_map(lambda a: conv(**a), mesh=mesh, in_specs=(specs,), out_specs=out, check_vma=False)(together)


def value_and_gradients(conv, args, static):
    """y, the final state, and the gradients of a random functional of both."""

    def functional(args):
        draw, out = np.random.default_rng(7), conv(args, static)
        return sum(jnp.sum(x * jnp.asarray(draw.normal(size=x.shape), x.dtype)) for x in out), out

    gradients, out = jax.grad(functional, has_aux=True)(args)
    return out, gradients


@jax.jit  # compiled once for all cases with the same arguments
def in_pieces(args, static):
    return value_and_gradients(functools.partial(split, mesh=mesh()), args, static)


@jax.jit
def as_a_whole(args, static):
    whole = functools.partial(short_conv, activation="silu", implementation="xla")
    return value_and_gradients(lambda a, s: whole(**a, **s), args, static)


@pytest.mark.parametrize("taps", [4, 8])  # 7 tokens before a piece of 5: the two pieces before it
@pytest.mark.parametrize("case", SPLITS)
def test_equals_whole(case, taps):
    args, static = inputs(taps), SPLITS[case]
    want = as_a_whole(args, static)
    assert_close(in_pieces(args, static), want, 1e-6)


def test_poisoned_padding_never_leaks():
    args, static = inputs(4), SPLITS["padded and packed"]
    got, want = in_pieces(poisoned(args, static["mask"], ("x",)), static), in_pieces(args, static)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), got, want)


@pytest.mark.slow
def test_only_the_last_inputs_leave_their_chip():
    """Forward and backward compiled for 16 TPU chips: W - 1 rows of each piece, and the gradients of the weights."""
    tpu, taps, width, length = tpu_mesh(data=2, sequence=8), 4, 256, 4096
    shapes = dict(
        x=((2, length, width), jnp.bfloat16),
        weight=((taps, width), jnp.float32),
        bias=((width,), jnp.float32),
        initial_state=((2, taps - 1, width), jnp.float32),
        segment_ids=((2, length), jnp.int32),
    )
    args = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(tpu, SPECS[name]))
        for name, (shape, dtype) in shapes.items()
    }
    static = {"segment_ids": args.pop("segment_ids")}

    def functional(args, static):
        y, state = split(args, static, tpu)
        return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(state**2)

    sizes = moved(jax.jit(jax.value_and_grad(functional)).lower(args, static).compile())
    assert sizes.get("all-gather"), sizes
    assert max(max(s) for s in sizes.values()) <= 8 * 8 * width, sizes  # 8 pieces of 3 rows, padded to 8
