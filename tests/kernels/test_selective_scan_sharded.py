"""The selective scan with time split over devices equals the whole, in value and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from seqmodels.kernels import selective_scan as op
from seqmodels.kernels.arrays import pad
from seqmodels.kernels.selective_scan import mosaic_gpu, reference, sharded
from seqmodels.kernels.selective_scan.mosaic_gpu import tuning
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


class Definitions:
    """The results of the kernels for Hopper GPUs by the definition of the scan, in place of the kernels, for one group.

    What is around the kernels, and chains the states of pieces and devices, then runs on any platform.
    """

    @staticmethod
    def scan(u, dt, A, B, C, D, z, dt_bias, initial_state, marks, softplus):
        """y [b, T, E'] and the final state; channels padded as A's."""
        u, dt, z = (None if x is None else pad(x, {-1: A.shape[1]}) for x in (u, dt, z))
        documents = dict(segment_ids=None, initial_segment=None, mask=None)
        if marks is not None:
            marks = marks[:, : u.shape[1]]
            begun = jnp.cumsum(marks[..., 0] < 0, axis=1, dtype=jnp.int32)
            first = jnp.zeros(len(begun), jnp.int32)
            documents = dict(segment_ids=begun, initial_segment=first, mask=marks[..., 1] > 0)
        optional = dict(z=z, dt_bias=dt_bias, weights=None, initial_state=initial_state)
        return reference.selective_scan(u, dt, A, B, C, D, **optional, **documents, dt_softplus=softplus)

    @classmethod
    def end_of_state(cls, u, dt, A, B, dt_bias, marks, softplus):
        end = cls.scan(u, dt, A, B, B, None, None, dt_bias, jnp.zeros((len(u), *A.shape)), marks, softplus)[1]
        return end, cls.steps(dt, A, dt_bias, marks, softplus)

    @staticmethod
    def steps(dt, A, dt_bias, marks, softplus):
        dt = pad(dt, {-1: A.shape[1]}) + dt_bias
        dt = jax.nn.softplus(dt) if softplus else dt
        dt = dt if marks is None else jnp.where(marks[:, : dt.shape[1], 1, None, None] > 0, dt, 0)
        return jnp.sum(dt, axis=1)

    @classmethod
    def end_of_gradient(cls, dt, A, C, z, dt_bias, weights, marks, dy, softplus):
        nothing = jnp.zeros_like(dt), jnp.zeros_like(C), jnp.zeros((len(dt), *A.shape))

        def y(state):
            return cls.scan(nothing[0], dt, A, nothing[1], C, None, z, dt_bias, state, marks, softplus)[0]

        (start,) = jax.vjp(y, nothing[2])[1](pad(dy, {-1: A.shape[1]}))
        return start, cls.steps(dt, A, dt_bias, marks, softplus)

    @classmethod
    def forward(cls, u, dt, A, B, C, D, z, dt_bias, weights, initial_state, marks, softplus, block, chunk, save):
        ys, state, saved = [], initial_state, []
        for first in range(0, u.shape[1], save or chunk):
            cut = lambda x, first=first: None if x is None else x[:, first : first + (save or chunk)]  # noqa: E731
            saved.append(state.reshape(len(u), -1))
            y, state = cls.scan(
                *map(cut, (u, dt)), A, *map(cut, (B, C)), D, cut(z), dt_bias, state, cut(marks), softplus
            )
            ys.append(y)
        return jnp.concatenate(ys, 1), state, jnp.stack(saved, 1)

    @classmethod
    def backward(cls, u, dt, A, B, C, D, z, dt_bias, weights, marks, saved, dy, dfinal, softplus, chunk):
        def one(arrays, marks, dy, dfinal):
            def run(u, dt, A, B, C, D, z, dt_bias, state):
                row = [None if x is None else x[None] for x in (u, dt, B, C, z, state, marks)]
                y, last = cls.scan(row[0], row[1], A, row[2], row[3], D, row[4], dt_bias, row[5], row[6], softplus)
                return y[0], last[0]

            return jax.vjp(run, *arrays)[1]((dy, dfinal))

        rows, start = len(u), saved[:, 0].reshape(len(u), *A.shape)
        same = lambda x: jnp.broadcast_to(x, (rows, *x.shape))  # noqa: E731
        given = u, dt, same(A), B, C, same(D), z, same(dt_bias), start
        du, ddt, dA, dB, dC, dD, dz, dbias, dinitial = jax.vmap(one)(given, marks, pad(dy, {-1: A.shape[1]}), dfinal)
        gradients = dict(du=du, ddt=ddt, dA=dA, dD=dD[:, None, None], dbias=dbias[:, None], dinitial=dinitial)
        return gradients | dict(dBC=jnp.stack([dB, dC], axis=3)[:, None], dz=dz[:, :, None])


@pytest.mark.parametrize("case", ["plain", "padded and packed"])
def test_kernels_for_gpus_chain_devices_themselves(monkeypatch, case):
    """Two pieces of time forwards on each device, one backwards; the kernels replaced by what they compute."""
    for name in ("end_of_state", "end_of_gradient", "forward", "backward"):
        monkeypatch.setattr(mosaic_gpu, name, getattr(Definitions, name))
    monkeypatch.setattr(mosaic_gpu, "supports", lambda *facts, **more: None)
    monkeypatch.setattr(sharded, "UNROLLED", 0)
    monkeypatch.setattr(tuning, "plan_forward", lambda *shape: (128, 2))
    monkeypatch.setattr(tuning, "plan_backward", lambda *shape: 1)
    args, static = {name: x for name, x in inputs().items() if name != "weights"}, SPLITS[case]
    scan = functools.partial(split, mesh=mesh(), implementation="mosaic_gpu")
    got = jax.jit(functools.partial(value_and_gradients, scan))(args, static)
    assert_close(got, as_a_whole(args, static), 1e-5)
