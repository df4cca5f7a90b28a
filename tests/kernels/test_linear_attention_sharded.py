"""Linear attention with time split over devices equals the whole, in value and every gradient."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from seqmodels import parallel
from seqmodels.kernels.linear_attention import linear_attention, sharded, xla
from seqmodels.training.sharding import AXES, RULES
from tests.kernels.helpers import assert_close, poisoned, value_and_gradients
from tests.kernels.inputs import linear_attention_inputs as inputs
from tests.kernels.split_time import LENGTH, PIECES, SPLITS, moved, tpu_mesh

TIME = P("data", "sequence")
SPECS = dict(q=TIME, k=TIME, v=TIME, segment_ids=TIME, mask=TIME, bonus=P())
SPECS |= dict(initial_state=P("data"), initial_segment=P("data"))

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

VARIANTS = {
    "head": (dict(), dict(scale=0.7)),
    "channel": (dict(decay="channel", bonus=True), dict(read="exclusive")),
    "constant": (dict(decay="constant"), dict(read="exclusive", scale=0.7)),
    "no decay": (dict(decay="none", normalise=True), dict(normalise=True)),
}


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Pieces as short as these go through chunks too, like long ones."""
    monkeypatch.setattr(xla, "UNROLLED", 0)


def arguments(variant):
    """Random arguments, with a memory so long that a state crosses several pieces."""
    return inputs(length=LENGTH, rate=0.1, **VARIANTS[variant][0])


def mesh():
    return jax.make_mesh((2, PIECES), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)


def split(args, static, mesh, **options):
    """The operation in pieces of time, rows over the other axis."""
    together = args | static
    decay = args.get("log_decay")
    specs = SPECS | dict(log_decay=P() if decay is None or decay.ndim == 1 else TIME)
    specs = {name: specs[name] for name in together}
    run = functools.partial(sharded.linear_attention, axis="sequence", **options)
    out = (TIME, P("data"))
    return jax.shard_map(lambda a: run(**a), mesh=mesh, in_specs=(specs,), out_specs=out, check_vma=False)(together)


@functools.partial(jax.jit, static_argnames="variant")
def in_pieces(args, static, variant):
    """y on real tokens, the final state, and the gradients of a random functional of both."""
    options = VARIANTS[variant][1]

    def outputs(args):
        y, state = split(args, static, mesh(), **options, implementation="xla")
        return (jnp.where(static["mask"][..., None, None], y, 0) if "mask" in static else y), state

    results, pull = jax.vjp(outputs, args)
    draw = np.random.default_rng(7)
    (gradients,) = pull(tuple(jnp.asarray(draw.normal(size=x.shape), x.dtype) for x in results))
    return results, gradients


def whole(args, static, variant):
    return value_and_gradients(linear_attention, args, static, "xla", VARIANTS[variant][1], patched="chunks")


PAIRS = [("head", case) for case in SPLITS]
PAIRS += [(variant, "padded and packed") for variant in VARIANTS if variant != "head"]


@pytest.mark.parametrize("variant, case", PAIRS)
def test_equals_whole(variant, case):
    args, static = arguments(variant), SPLITS[case]
    want = whole(args, static, variant)
    assert_close(in_pieces(args, static, variant), want, 1e-5)
    assert np.linalg.norm(want[1]["initial_state"]) > 1e-2 or "another" in case, "the initial state does not matter"


def test_a_state_crosses_every_piece():
    """The last output depends on the first token, through all the pieces between."""
    args = arguments("head")
    changed = args | dict(v=args["v"] + 10 * (np.arange(LENGTH) == 0)[:, None, None].astype(np.float32))
    (y, _), _ = in_pieces(args, {}, "head")
    (other, _), _ = in_pieces(changed, {}, "head")
    assert (np.abs(other - y)[:, -1] > 1e-4).all()


def test_extreme_decays():
    """What is all gone stays gone, and exactly one is exactly one."""
    args, static = arguments("channel"), SPLITS["padded and packed"]
    draw = np.random.default_rng(3)
    args["log_decay"] = np.float32(draw.choice([0.0, -1e4, -0.1], args["log_decay"].shape, p=[0.6, 0.1, 0.3]))
    want = whole(args, static, "channel")
    assert_close(in_pieces(args, static, "channel"), want, 1e-5)


def test_poisoned_padding_never_leaks():
    args, static = arguments("channel"), SPLITS["padded and packed"]
    hidden = poisoned(args, static["mask"], ("q", "k", "v", "log_decay"))
    assert_close(in_pieces(hidden, static, "channel"), in_pieces(args, static, "channel"), 1e-7)


def test_on_the_mesh_of_a_model():
    """Rows, heads and time split together."""
    shape = tuple(dict(data=2, tensor=2, sequence=2).get(axis, 1) for axis in AXES)
    args, static = inputs(length=LENGTH), SPLITS["padded and packed"]
    want = linear_attention(**args, **static)
    with (
        jax.set_mesh(jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))),
        nn.logical_axis_rules(RULES),
    ):
        got = jax.jit(lambda a, s: parallel.linear_attention(**a, **s))(args, static)
        text = str(jax.make_jaxpr(lambda a: parallel.linear_attention(**a))(args))
    real = static["mask"][..., None, None]
    assert_close((np.where(real, got[0], 0), got[1]), (np.where(real, want[0], 0), want[1]), 1e-5)
    assert "shard_map" in text and "all_gather" in text


def test_heads_stay_with_their_keys():
    """Two groups do not divide over four devices, so four heads do not either."""
    mesh = AbstractMesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules(RULES):
        for groups, split in ((1, True), (2, False), (4, True)):
            text = str(jax.make_jaxpr(lambda a: parallel.linear_attention(**a))(inputs(groups=groups)))
            assert ("f32[2,11,1,5]" in text) == split, groups


@pytest.mark.slow
def test_no_activation_leaves_its_chip():
    """Forward and backward compiled for 16 TPU chips: what crosses is smaller than one row of a piece."""
    tpu = tpu_mesh(data=2, sequence=8)
    batch, length, heads, keys, values = 2, 4096, 4, 32, 64
    shapes = dict(q=(batch, length, 1, keys), k=(batch, length, 1, keys), v=(batch, length, heads, values))
    shapes |= dict(log_decay=(batch, length, heads), segment_ids=(batch, length))
    shapes |= dict(initial_state=(batch, heads, keys, values))
    specs = SPECS | dict(log_decay=TIME)
    dtypes = dict(segment_ids=jnp.int32, log_decay=jnp.float32, initial_state=jnp.float32)
    args = {
        name: jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.bfloat16), sharding=NamedSharding(tpu, specs[name]))
        for name, shape in shapes.items()
    }
    static = {"segment_ids": args.pop("segment_ids")}

    def functional(args, static):
        y, state = split(args, static, tpu, implementation="xla")
        return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(state**2)

    sizes = moved(jax.jit(jax.value_and_grad(functional)).lower(args, static).compile())
    assert sizes.get("all-gather"), sizes
    assert max(max(s) for s in sizes.values()) < length // 8 * heads * values, sizes
