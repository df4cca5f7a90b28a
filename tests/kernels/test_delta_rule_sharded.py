"""The delta rule with time split over devices equals the whole, in value and every gradient."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from seqmodels import parallel
from seqmodels.kernels.delta_rule import delta_rule, sharded, xla
from seqmodels.training.sharding import AXES, RULES
from tests.kernels.helpers import assert_close, poisoned, value_and_gradients
from tests.kernels.inputs import delta_rule_inputs as inputs
from tests.kernels.split_time import LENGTH, PIECES, SPLITS

TIME = P("data", "sequence")
NAMES = ("q", "k", "v", "a", "b", "log_decay")
SPECS = dict.fromkeys((*NAMES, "segment_ids", "mask"), TIME)
SPECS |= dict.fromkeys(("initial_state", "initial_segment"), P("data"))

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

VARIANTS = {
    "head": (dict(), dict(scale=0.7)),
    "channel": (dict(decay="channel"), dict(read="exclusive")),
    "no decay": (dict(decay="none"), dict(read="exclusive", scale=0.7)),
}


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Pieces as short as these go through chunks too, like long ones."""
    monkeypatch.setattr(xla, "UNROLLED", 0)


def arguments(variant):
    """Random arguments, with a memory so long that a state crosses several pieces."""
    return inputs(length=LENGTH, rate=0.1, **VARIANTS[variant][0])


@functools.partial(jax.jit, static_argnames="variant")
def in_pieces(args, static, variant):
    """y, the final state, and the gradients of a random functional of both; rows are split over the other axis."""
    mesh = jax.make_mesh((2, PIECES), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    run = functools.partial(sharded.delta_rule, axis="sequence", implementation="xla", **VARIANTS[variant][1])

    def outputs(args):
        together = args | static
        specs = {name: SPECS[name] for name in together}
        split = jax.shard_map(
            lambda a: run(**a), mesh=mesh, in_specs=(specs,), out_specs=(TIME, P("data")), check_vma=False
        )
        return split(together)

    results, pull = jax.vjp(outputs, args)
    draw = np.random.default_rng(7)
    (gradients,) = pull(tuple(jnp.asarray(draw.normal(size=x.shape), x.dtype) for x in results))
    return results, gradients


def whole(args, static, variant):
    return value_and_gradients(delta_rule, args, static, "xla", VARIANTS[variant][1], patched="chunks")


QUICK = ("plain", "padded and packed", "the state is another document's")
PAIRS = [pytest.param("head", case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in SPLITS]
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
    assert (np.abs(other - y)[:, -1] > 1e-5).all()


def test_poisoned_padding_never_leaks():
    args, static = arguments("channel"), SPLITS["padded and packed"]
    hidden = poisoned(args, static["mask"], NAMES)
    assert_close(in_pieces(hidden, static, "channel"), in_pieces(args, static, "channel"), 1e-7)


def test_on_the_mesh_of_a_model():
    """Rows, heads and time split together."""
    shape = tuple(dict(data=2, tensor=2, sequence=2).get(axis, 1) for axis in AXES)
    args, static = inputs(length=LENGTH), SPLITS["padded and packed"]
    want = delta_rule(**args, **static)
    with (
        jax.set_mesh(jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))),
        nn.logical_axis_rules(RULES),
    ):
        got = jax.jit(lambda a, s: parallel.delta_rule(**a, **s))(args, static)
        text = str(jax.make_jaxpr(lambda a: parallel.delta_rule(**a))(args))
    assert_close(got, want, 1e-5)
    assert "shard_map" in text and "all_gather" in text


def test_heads_stay_with_their_keys():
    """Two groups do not divide over four devices, so four heads do not either, nor keys of all heads."""
    mesh = AbstractMesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules(RULES):
        for groups, split in ((1, True), (2, False), (4, True)):
            text = str(jax.make_jaxpr(lambda a: parallel.delta_rule(**a))(inputs(groups=groups)))
            assert ("f32[2,11,1,5]" in text) == split, groups
