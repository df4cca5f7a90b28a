"""Random lengths, documents and masks against the sequential float64 reference.

Rows of a batch are layouts of their own, as for the selective scan: see test_selective_scan_random.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_linear_attention import inputs
from test_selective_scan import assert_close
from test_selective_scan_random import ROWS, draw_documents, layouts

from seqmodels.kernels.linear_attention import linear_attention

# with T, K and V that are and are not multiples of anything, and chunks that are cut and that are not
SHAPES = [
    dict(length=37, groups=2, keys=3, values=5, decay="head", chunk=16),
    dict(length=1, groups=1, keys=1, values=1, decay="constant"),
    dict(length=8, groups=4, keys=2, values=7, decay="channel", bonus=True),
    dict(length=16, groups=1, keys=8, values=4, decay="none", normalise=True),
    dict(length=67, groups=2, keys=4, values=3, decay="channel", bonus=True),
    dict(length=83, groups=4, keys=5, values=2, decay="constant", normalise=True),
]


@functools.partial(jax.jit, static_argnames=("options", "implementation"))
def value_and_gradients(args, documents, cotangents, options, implementation):
    """y on real tokens, the final state, and what `cotangents` of both pull back to."""

    def outputs(args):
        y, state = linear_attention(**args, **documents, **dict(options), implementation=implementation)
        return jnp.where(documents["mask"][..., None, None], y, 0), state

    results, pull = jax.vjp(outputs, args)
    return results, pull(cotangents)


def check(shape, rows, seed, implementation="xla"):
    shape = dict(shape, heads=4)
    options = dict(chunk=shape.pop("chunk", None), normalise=shape.get("normalise", False))
    options |= dict(read="exclusive" if "bonus" in shape else "inclusive")
    draw = np.random.default_rng(seed)
    documents = draw_documents(rows, shape["length"], draw)
    args = inputs(batch=len(rows), seed=seed, **shape)
    cotangents = tuple(draw.normal(size=args[name].shape) for name in ("v", "initial_state"))

    def run(dtype, implementation):
        numbers = jax.tree.map(lambda x: np.asarray(x, dtype), (args, cotangents))
        return value_and_gradients(numbers[0], documents, numbers[1], tuple(options.items()), implementation)

    got = run(np.float32, implementation)
    with jax.enable_x64(True):
        want = run(np.float64, "reference")
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize(
    "shape",
    [SHAPES[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SHAPES)],
    ids=lambda s: f"{s['decay']}-{s['length']}",
)
def test_random_layouts(shape, request):
    """Six shapes of 11 batches of 16 rows: 1,056 layouts; one batch in the quick tests."""
    slow = request.node.get_closest_marker("slow")

    @settings(max_examples=11 if slow else 1, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(rows=st.lists(layouts, min_size=ROWS, max_size=ROWS), seed=st.integers(0, 2**16))
    def run(rows, seed):
        check(shape, rows, seed)

    run()
