"""Random layouts of documents and padding, one a row, for tests by hypothesis."""

import numpy as np
from hypothesis import strategies as st

ROWS = 16  # layouts a batch

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
        segment_ids=np.cumsum(starts, axis=1).astype(np.int32),
        initial_segment=np.zeros(len(rows), np.int32),
        mask=(draw.random((len(rows), length)) < real) & inside,
    )
