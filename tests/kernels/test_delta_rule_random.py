"""Random lengths, documents and masks against the sequential float64 reference.

Rows of a batch are layouts of their own, as for the selective scan: see test_selective_scan_random.py.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqmodels.kernels.delta_rule import delta_rule
from tests.kernels.helpers import assert_close, expected, value_and_gradients
from tests.kernels.inputs import delta_rule_inputs as inputs
from tests.kernels.layouts import ROWS, draw_documents, layouts

# with T, K and V that are and are not multiples of anything, and chunks that are cut and that are not
SHAPES = [
    dict(length=37, groups=2, keys=3, values=5, decay="head", chunk=8),
    dict(length=1, groups=1, keys=1, values=1, decay="head"),
    dict(length=8, groups=4, keys=2, values=7, decay="channel", read="exclusive"),
    dict(length=67, groups=2, keys=4, values=3, decay="channel", own="kb"),
    dict(length=83, groups=4, keys=5, values=2, decay="none", read="exclusive", own=""),
]


def check(shape, rows, seed):
    shape = dict(shape, heads=4)
    options = {name: shape.pop(name) for name in ("chunk", "read") if name in shape}
    static = draw_documents(rows, shape["length"], np.random.default_rng(seed))
    args = inputs(batch=len(rows), seed=seed, **shape)
    got = value_and_gradients(delta_rule, args, static, "xla", options)
    assert_close(got, expected(delta_rule, args, static, options), 1e-5)


@pytest.mark.parametrize(
    "shape",
    [SHAPES[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SHAPES)],
    ids=lambda s: f"{s['decay']}-{s['length']}",
)
def test_random_layouts(shape, request):
    """Five shapes of 11 batches of 16 rows: 880 layouts; one batch in the quick tests."""
    slow = request.node.get_closest_marker("slow")

    @settings(max_examples=11 if slow else 1, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(rows=st.lists(layouts, min_size=ROWS, max_size=ROWS), seed=st.integers(0, 2**16))
    def run(rows, seed):
        check(shape, rows, seed)

    run()
