"""The linear scan with time split over devices equals the whole, in value and every gradient."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqmodels import parallel
from seqmodels.kernels.linear_scan import linear_scan, sharded
from seqmodels.training.sharding import AXES, RULES
from tests.kernels.helpers import assert_close, poisoned, value_and_gradients
from tests.kernels.inputs import linear_scan_inputs as inputs
from tests.kernels.split_time import LENGTH, PIECES, SPLITS

TIME = P("data", "sequence")
NAMES = ("log_decay", "x")
SPECS = dict.fromkeys((*NAMES, "segment_ids", "mask"), TIME)
SPECS |= dict.fromkeys(("initial_state", "initial_segment"), P("data"))

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


def arguments():
    """Random arguments, with a memory so long that a state crosses several pieces."""
    return inputs(length=LENGTH, rate=0.1)


@functools.partial(jax.jit, static_argnames="reverse")
def in_pieces(args, static, reverse):
    """h, the final state, and the gradients of a random functional of both; rows are split over the other axis."""
    mesh = jax.make_mesh((2, PIECES), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    run = functools.partial(sharded.linear_scan, axis="sequence", implementation="xla", reverse=reverse)

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


QUICK = ("plain", "padded and packed", "the state is another document's")
PAIRS = [(case, reverse) for case in SPLITS for reverse in (False, True)]


@pytest.mark.parametrize(
    ("case", "reverse"),
    [pytest.param(*pair, marks=[] if pair[0] in QUICK else [pytest.mark.slow]) for pair in PAIRS],
)
def test_equals_whole(case, reverse):
    args, static = arguments(), SPLITS[case]
    want = value_and_gradients(linear_scan, args, static, "xla", dict(reverse=reverse))
    assert_close(in_pieces(args, static, reverse), want, 1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_state_crosses_every_piece(reverse):
    """The last output depends on the first token, through all the pieces between."""
    args = arguments()
    start, end = (-1, 0) if reverse else (0, -1)
    x = args["x"].copy()
    x[:, start] += 10
    (h, _), _ = in_pieces(args, {}, reverse)
    (other, _), _ = in_pieces(args | dict(x=x), {}, reverse)
    assert (np.abs(other - h)[:, end] > 1e-5).all()


def test_poisoned_padding_never_leaks():
    args, static = arguments(), SPLITS["padded and packed"]
    hidden = poisoned(args, static["mask"], NAMES)
    assert_close(in_pieces(hidden, static, False), in_pieces(args, static, False), 1e-7)


def test_on_the_mesh_of_a_model():
    """Rows, channels and time split together; an axis between time and channels stays whole."""
    shape = tuple(dict(data=2, tensor=2, sequence=2).get(axis, 1) for axis in AXES)
    args, static = inputs(length=LENGTH, width=(3, 4)), SPLITS["padded and packed"]
    want = linear_scan(**args, **static)
    with (
        jax.set_mesh(jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))),
        nn.logical_axis_rules(RULES),
    ):
        got = jax.jit(lambda a, s: parallel.linear_scan(**a, **s))(args, static)
        text = str(jax.make_jaxpr(lambda a: parallel.linear_scan(**a))(args))
    assert_close(got, want, 1e-5)
    assert "shard_map" in text and "all_gather" in text and "f32[1,10,3,2]" in text
