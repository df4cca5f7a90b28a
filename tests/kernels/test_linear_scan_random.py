"""Random lengths, documents and masks against the sequential float64 reference.

Rows of a batch are layouts of their own, as for the selective scan: see test_selective_scan_random.py.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqmodels.kernels.linear_scan import linear_scan, xla
from tests.kernels.helpers import assert_close, expected, value_and_gradients
from tests.kernels.inputs import linear_scan_inputs as inputs
from tests.kernels.layouts import ROWS, draw_documents, layouts

SHAPES = [  # of one chunk, and of several, whole and not
    dict(length=67, width=3, chunks=True),
    dict(length=37, width=4, reverse=True, chunks=True),
    dict(length=64, width=1, reverse=False, chunks=True),
    dict(length=1, width=2),
    dict(length=8, width=3, reverse=True),
    dict(length=83, width=5, reverse=True),
]


@pytest.mark.parametrize(
    "shape",
    [SHAPES[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SHAPES)],
    ids=lambda s: f"{s['length']}-{'reverse' if s.get('reverse') else 'forward'}",
)
def test_random_layouts(shape, request, monkeypatch):
    """Six shapes of 11 batches of 16 rows: 1056 layouts; one batch in the quick tests."""
    slow = request.node.get_closest_marker("slow")
    shape = dict(shape)
    options, chunks = dict(reverse=shape.pop("reverse", False)), shape.pop("chunks", False)
    if chunks:
        monkeypatch.setattr(xla, "_by_platform", lambda whole, several, *arrays: several(*arrays))

    @settings(max_examples=11 if slow else 1, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(rows=st.lists(layouts, min_size=ROWS, max_size=ROWS), seed=st.integers(0, 2**16))
    def run(rows, seed):
        static = draw_documents(rows, shape["length"], np.random.default_rng(seed))
        args = inputs(batch=len(rows), seed=seed, **shape)
        got = value_and_gradients(linear_scan, args, static, "xla", options, "several chunks" if chunks else "")
        assert_close(got, expected(linear_scan, args, static, options), 1e-5)

    run()
