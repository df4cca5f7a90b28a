"""Sizes of the kernels of grouped products, as measured on an H200 (benchmarks/notes/grouped_matmul.md)."""

from seqmodels.kernels.grouped_matmul.mosaic_gpu.pipeline import Plan


def plan(outer: int) -> Plan:
    """For a result of `outer` columns: as many in a tile as make sense, and as many slots as shared memory holds."""
    return Plan(columns=256, slots=4) if outer > 128 else Plan(columns=128, slots=6)
