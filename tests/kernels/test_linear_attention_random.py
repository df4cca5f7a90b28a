"""Random lengths, documents and masks against the sequential float64 reference.

Rows of a batch are layouts of their own, as for the selective scan: see test_selective_scan_random.py.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqmodels.kernels.linear_attention import linear_attention
from tests.kernels.helpers import assert_close, expected, value_and_gradients
from tests.kernels.inputs import linear_attention_inputs as inputs
from tests.kernels.layouts import ROWS, draw_documents, layouts

# with T, K and V that are and are not multiples of anything, and chunks that are cut and that are not
SHAPES = [
    dict(length=37, groups=2, keys=3, values=5, decay="head", chunk=16),
    dict(length=1, groups=1, keys=1, values=1, decay="constant"),
    dict(length=8, groups=4, keys=2, values=7, decay="channel", bonus=True),
    dict(length=16, groups=1, keys=8, values=4, decay="none", normalise=True),
    dict(length=67, groups=2, keys=4, values=3, decay="channel", bonus=True),
    dict(length=83, groups=4, keys=5, values=2, decay="constant", normalise=True),
]


def check(shape, rows, seed, implementation="xla"):
    shape = dict(shape, heads=4)
    options = dict(chunk=shape.pop("chunk", None), normalise=shape.get("normalise", False))
    options |= dict(read="exclusive" if "bonus" in shape else "inclusive")
    static = draw_documents(rows, shape["length"], np.random.default_rng(seed))
    args = inputs(batch=len(rows), seed=seed, **shape)
    got = value_and_gradients(linear_attention, args, static, implementation, options)
    assert_close(got, expected(linear_attention, args, static, options), 1e-5)


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
