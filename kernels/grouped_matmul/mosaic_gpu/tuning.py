"""Sizes of the kernels of grouped products, as measured on an H200 (benchmarks/notes/grouped_matmul.md)."""

from seqmodels.kernels.grouped_matmul.mosaic_gpu.pipeline import Plan


def rows(outer: int) -> Plan:
    """For the products of rows with [K, N] matrices; `outer` is N."""
    return Plan(columns=256 if outer > 128 else 128)


def groups(outer: int) -> Plan:
    """For the sums over a group's rows of [K, N] matrices."""
    return Plan(columns=256 if outer > 128 else 128)
