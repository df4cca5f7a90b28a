"""Documents and padding of three short rows: all that can happen around the few tokens that a convolution sees."""

import numpy as np

BATCH, LENGTH = 3, 9

SEGMENTS = np.array(
    [
        [0, 0, 0, 1, 1, 0, 0, 0, 0],  # document 0 comes back: it starts anew
        [4, 4, 4, 4, 4, 4, 4, 5, 5],  # a state of fewer tokens than taps
        [2, 2, 3, 3, 3, 3, 3, 3, 7],  # the state belongs to another document
    ],
    np.int32,
)
INITIAL_SEGMENT = np.array([0, 4, 9], np.int32)
MASKS = {
    "left": np.arange(LENGTH) >= np.array([[0], [3], [8]]),
    "right": np.arange(LENGTH) < np.array([[9], [5], [1]]),
    "interior": np.array([[1, 0, 1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0, 1, 1], [0, 0, 1, 0, 1, 0, 1, 0, 0]], bool),
    "whole rows": np.arange(LENGTH) * np.array([[0], [1], [0]]) > 0,
}
LAYOUTS = {
    "plain": {},
    "packed": dict(segment_ids=SEGMENTS, initial_segment=INITIAL_SEGMENT),
    "packed, the state goes on": dict(segment_ids=SEGMENTS),
    **{f"padded, {name}": dict(mask=mask) for name, mask in MASKS.items()},
    "packed and padded": dict(segment_ids=SEGMENTS, initial_segment=INITIAL_SEGMENT, mask=MASKS["interior"]),
    "packed and padded, the state goes on": dict(segment_ids=SEGMENTS, mask=MASKS["left"]),
}
