"""Time split over devices: what lies across the cuts, and what XLA sends between the chips of a TPU slice."""

import importlib.util
import math
import os
import re

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

PIECES, LENGTH = 4, 20  # five tokens a piece

_CROSSING = np.array([[0] * 7 + [1] * 13, [3] * 2 + [4] * 1 + [5] * 17], np.int32)
_AT_CUTS = np.array([[0] * 5 + [1] * 5 + [2] * 10, [7] * 15 + [8] * 5], np.int32)
_RETURNING = np.array([[0] * 5 + [1] * 5 + [0] * 10, [2, 3] * 10], np.int32)
_SOME = np.random.default_rng(5).random((2, LENGTH)) < 0.6
_WHOLE_PIECES = np.repeat(np.array([[1, 0, 0, 1], [0, 1, 0, 1]], bool), LENGTH // PIECES, axis=1)
_LAST_TOKEN_ONLY = np.array([[0] * 9 + [1] + [0] * 10, [0] * 20], bool)

SPLITS = {
    "plain": {},
    "documents cross cuts": dict(segment_ids=_CROSSING),
    "documents begin at cuts": dict(segment_ids=_AT_CUTS, initial_segment=np.array([0, 7], np.int32)),
    "the state is another document's": dict(segment_ids=_CROSSING, initial_segment=np.array([0, 9], np.int32)),
    "documents return": dict(segment_ids=_RETURNING, initial_segment=np.array([0, 2], np.int32)),
    "padded": dict(mask=_SOME),
    "pieces of padding": dict(mask=_WHOLE_PIECES),
    "padded and packed": dict(segment_ids=_CROSSING, initial_segment=np.array([0, 3], np.int32), mask=_SOME),
    "pieces of padding, packed": dict(segment_ids=_AT_CUTS, mask=_WHOLE_PIECES),
    "a document goes on after padding": dict(
        segment_ids=np.where(_WHOLE_PIECES, 6, 1).astype(np.int32),
        initial_segment=np.array([6, 6], np.int32),
        mask=_WHOLE_PIECES,
    ),
    "one real token": dict(segment_ids=_RETURNING, mask=_LAST_TOKEN_ONLY),
}


def tpu_mesh(**axes: int) -> Mesh:
    """A mesh of the 16 chips of a v5e slice, to compile for; skips the test where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu to compile for a TPU")
    for name, value in dict(
        TPU_SKIP_MDS_QUERY="1",  # there is no metadata server to ask
        TPU_ACCELERATOR_TYPE="v5litepod-16",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # tests run in several processes
        TPU_LOG_DIR="disabled",
    ).items():
        os.environ.setdefault(name, value)
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    return Mesh(np.array(devices).reshape(tuple(axes.values())), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def moved(compiled: jax.stages.Compiled) -> dict[str, list[int]]:
    """Elements of each result of each collective operation, by the operation's name."""
    out = {}
    for result, name in re.findall(
        r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", compiled.as_text()
    ):
        for shape in re.findall(r"\w+\[([\d,]*)\]", result):
            out.setdefault(name, []).append(math.prod(int(n) for n in shape.split(",") if n))
    return out
