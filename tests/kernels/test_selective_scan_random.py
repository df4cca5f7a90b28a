"""Random lengths, documents and masks against the sequential float64 reference.

Rows of a batch are layouts of their own: each has a length, documents and holes that hypothesis draws. So a thousand
of them cost a few compilations, one for each shape. On a machine with a GPU its kernels are tested too:

    JAX_PLATFORMS=cuda python -m pytest -n 0 tests/kernels/test_selective_scan_random.py
"""

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqmodels.kernels.selective_scan import selective_scan
from tests.kernels.helpers import assert_close, expected, value_and_gradients
from tests.kernels.inputs import selective_scan_inputs as inputs
from tests.kernels.layouts import ROWS, draw_documents, layouts

IMPLEMENTATIONS = ["xla", "mosaic_gpu"] if jax.default_backend() == "gpu" else ["xla"]
# length, groups, width, states; with T, E and N that are and are not multiples of anything
SHAPES = [
    (1, 1, 3, 1),
    (2, 2, 1, 5),
    (16, 1, 8, 16),
    (33, 3, 5, 4),
    (67, 1, 7, 9),
    (130, 2, 3, 2),
    (40, 4, 6, 33),
    (70, 1, 9, 20),
]


def check(shape, rows, seed, implementation):
    length, groups, width, state = shape
    static = draw_documents(rows, length, np.random.default_rng(seed))
    args = inputs(len(rows), length, groups, width, state, seed=seed)
    got = value_and_gradients(selective_scan, args, static, implementation)
    assert_close(got, expected(selective_scan, args, static), 1e-5)


@pytest.mark.parametrize("shape", [SHAPES[3], *(pytest.param(s, marks=pytest.mark.slow) for s in SHAPES)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_random_layouts(shape, implementation, request):
    """Eight shapes of 8 batches of 16 rows: 1,024 layouts; one batch in the quick tests."""
    slow = request.node.get_closest_marker("slow")

    @settings(max_examples=8 if slow else 1, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(rows=st.lists(layouts, min_size=ROWS, max_size=ROWS), seed=st.integers(0, 2**16))
    def run(rows, seed):
        check(shape, rows, seed, implementation)

    run()
