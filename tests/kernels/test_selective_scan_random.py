"""Random lengths, documents and masks against the sequential float64 reference.

Rows of a batch are layouts of their own: each has a length, documents and holes that hypothesis draws. So a thousand
of them cost a few compilations, one for each shape. On a machine with a GPU its kernels are tested too:

    JAX_PLATFORMS=cuda python -m pytest -n 0 tests/kernels/test_selective_scan_random.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_selective_scan import assert_close, inputs

from seqmodels.kernels.selective_scan import selective_scan

ROWS = 16  # layouts a batch
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

layouts = st.tuples(
    st.floats(0, 1),  # share of the longest length
    st.floats(0, 1),  # how likely a token begins a document
    st.floats(0, 1),  # how likely a token is real
    st.booleans(),  # whether the first token goes on with the incoming state's document
)


def draw_documents(rows, length, draw):
    """segment_ids, initial_segment and mask of one layout a row."""
    share, changes, real, goes_on = (np.asarray(column)[:, None] for column in zip(*rows, strict=True))
    starts = draw.random((len(rows), length)) < changes
    starts[:, 0] = ~goes_on[:, 0]
    inside = np.arange(length) < np.ceil(share * length)
    return dict(
        segment_ids=jnp.asarray(np.cumsum(starts, axis=1), jnp.int32),
        initial_segment=jnp.zeros(len(rows), jnp.int32),
        mask=jnp.asarray((draw.random((len(rows), length)) < real) & inside),
    )


@functools.partial(jax.jit, static_argnames="implementation")
def value_and_gradients(args, documents, cotangents, implementation):
    """y on real tokens, the final state, and what `cotangents` of both pull back to."""

    def outputs(args):
        y, state = selective_scan(**args, **documents, implementation=implementation)
        return jnp.where(documents["mask"][..., None], y, 0), state

    results, pull = jax.vjp(outputs, args)
    return results, pull(cotangents)


def check(shape, rows, seed, implementation):
    length, groups, width, state = shape
    draw = np.random.default_rng(seed)
    documents = draw_documents(rows, length, draw)
    args = inputs(len(rows), length, groups, width, state, seed=seed)
    cotangents = tuple(draw.normal(size=s) for s in ((len(rows), length, width), (len(rows), groups, width, state)))

    def run(dtype, implementation):
        numbers = jax.tree.map(lambda x: np.asarray(x, dtype), (args, cotangents))
        return value_and_gradients(numbers[0], documents, numbers[1], implementation)

    got = run(np.float32, implementation)
    with jax.enable_x64(True):
        want = run(np.float64, "reference")
    assert_close(got, want, 1e-5)


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
