"""The selective scan with time split over devices equals the whole, in value and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from seqmodels.kernels import selective_scan as op
from seqmodels.kernels.selective_scan import sharded
from tests.kernels.helpers import assert_close, poisoned
from tests.kernels.inputs import selective_scan_inputs
from tests.kernels.split_time import LENGTH, PIECES, SPLITS, moved, tpu_mesh

BATCH, WIDTH, STATE = 2, 4, 3
TIME = P("data", "sequence")
SPECS = dict(u=TIME, dt=TIME, B=TIME, C=TIME, z=TIME, weights=TIME, segment_ids=TIME, mask=TIME)
SPECS |= dict(A=P(), D=P(), dt_bias=P(), initial_state=P("data"), initial_segment=P("data"))

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


def inputs(groups=0):
    """Random arguments, every optional one given, with a memory so long that a state crosses several pieces."""
    args = selective_scan_inputs(BATCH, LENGTH, groups, WIDTH, STATE)
    longer = dict(A=args["A"] / 2, dt_bias=args["dt_bias"] / 0.3 - 1.5, initial_state=args["initial_state"] * 3)
    return args | {name: x.astype(np.float32) for name, x in longer.items()}


def mesh():
    return jax.make_mesh((2, PIECES), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)


def split(args, static, mesh, **options):
    """The scan in pieces of time, rows over the other axis."""
    scan = functools.partial(sharded.selective_scan, axis="sequence", **options)
    together = args | static
    specs = {name: SPECS[name] for name in together}
    out = (TIME, P("data"))
    return jax.shard_map(lambda a: scan(**a), mesh=mesh, in_specs=(specs,), out_specs=out, check_vma=False)(together)


def value_and_gradients(scan, args, static):
    """y on real tokens, the final state, and the gradients of a random functional of both."""

    def functional(args):
        y, state = scan(args, static)
        y = jnp.where(static["mask"][..., None], y, 0) if "mask" in static else y
        draw = np.random.default_rng(7)
        return sum(jnp.sum(x * jnp.asarray(draw.normal(size=x.shape), x.dtype)) for x in (y, state)), (y, state)

    gradients, out = jax.grad(functional, has_aux=True)(args)
    return out, gradients


@jax.jit  # compiled once for all cases with the same arguments
def in_pieces(args, static):
    return value_and_gradients(functools.partial(split, mesh=mesh(), implementation="xla"), args, static)


@jax.jit
def as_a_whole(args, static):
    return value_and_gradients(lambda a, s: op.selective_scan(**a, **s, implementation="xla"), args, static)


@pytest.mark.parametrize("groups", [0, 3])
@pytest.mark.parametrize("case", SPLITS)
def test_equals_whole(case, groups):
    args, static = inputs(groups), SPLITS[case]
    want = as_a_whole(args, static)
    assert_close(in_pieces(args, static), want, 1e-5)
    assert np.linalg.norm(want[1]["initial_state"]) > 1e-2 or "another" in case, "the initial state does not matter"


def test_a_state_crosses_every_piece():
    """The last output depends on the first token, through all the pieces between."""
    args = inputs()
    changed = args | dict(u=args["u"] + 10 * (np.arange(LENGTH) == 0)[:, None].astype(np.float32))
    (y, _), _ = in_pieces(args, {})
    (other, _), _ = in_pieces(changed, {})
    assert (np.abs(other - y)[:, -1] > 1e-4).all()


def test_plain_arguments_only():
    args = inputs()
    bare = {name: args[name] for name in ("u", "dt", "A", "B", "C")}
    bare["dt"] = np.abs(bare["dt"])
    got = jax.jit(lambda a: split(a, {}, mesh(), dt_softplus=False))(bare)
    want = op.selective_scan(**bare, dt_softplus=False)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), got, want)


def test_poisoned_padding_never_leaks():
    args, static = inputs(3), SPLITS["padded and packed"]
    hidden = poisoned(args, static["mask"], ("u", "dt", "B", "C", "z"))
    got, want = in_pieces(hidden, static), in_pieces(args, static)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), got, want)


@pytest.mark.slow
def test_no_activation_leaves_its_chip():
    """Forward and backward compiled for 16 TPU chips: what crosses is smaller than one row of a piece."""
    tpu = tpu_mesh(data=2, sequence=8)
    length, width, state = 4096, 256, 16
    shapes = dict(u=(2, length, width), dt=(2, length, width), B=(2, length, state), C=(2, length, state))
    shapes |= dict(z=(2, length, width), segment_ids=(2, length))
    shapes |= dict(A=(width, state), D=(width,), dt_bias=(width,), initial_state=(2, width, state))
    dtypes = {name: jnp.bfloat16 if SPECS[name] == TIME else jnp.float32 for name in shapes}
    dtypes["segment_ids"] = jnp.int32
    args = {
        name: jax.ShapeDtypeStruct(shape, dtypes[name], sharding=NamedSharding(tpu, SPECS[name]))
        for name, shape in shapes.items()
    }
    static = {"segment_ids": args.pop("segment_ids")}

    def functional(args, static):
        y, state = split(args, static, tpu, implementation="xla")
        return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(state**2)

    sizes = moved(jax.jit(jax.value_and_grad(functional)).lower(args, static).compile())
    assert sizes.get("all-gather"), sizes
    assert max(max(s) for s in sizes.values()) < length // 8 * width, sizes
