"""Infinity and NaN of one document, of padding and of a dropped state reach no other document, in any implementation.

Kernels for GPUs and TPUs have the same test beside their other ones, in Pallas's interpreter.
"""

import functools

import numpy as np
import pytest

from seqmodels.kernels.linear_attention import linear_attention
from seqmodels.kernels.selective_scan import selective_scan
from seqmodels.kernels.short_conv import short_conv
from tests.kernels.inputs import linear_attention_inputs, selective_scan_inputs, short_conv_inputs
from tests.kernels.isolation import check_isolation

LENGTHS = (6, 40, 150)  # token by token, one chunk, several chunks
both = pytest.mark.parametrize("implementation", ["reference", "xla"])


@both
@pytest.mark.parametrize("length", LENGTHS)
def test_selective_scan(implementation, length):
    args = selective_scan_inputs(length=length, groups=2)
    operation = functools.partial(selective_scan, implementation=implementation)
    check_isolation(operation, args, ("u", "dt", "B", "C", "z", "weights"), 1e-5)


@both
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("read", ["inclusive", "exclusive"])
def test_linear_attention(implementation, length, decay, read):
    args = linear_attention_inputs(length=length, decay=decay, bonus=read == "exclusive")
    operation = functools.partial(linear_attention, implementation=implementation, read=read)
    check_isolation(operation, args, ("q", "k", "v", "log_decay"), 1e-5)


@both
@pytest.mark.parametrize("length", LENGTHS)
def test_short_conv(implementation, length):
    args = short_conv_inputs(length=length, batch=2)
    operation = functools.partial(short_conv, activation="silu", implementation=implementation)
    check_isolation(operation, args, ("x",))


@pytest.mark.parametrize("overflow", [1e25, 1e38])
def test_finite_numbers_that_overflow(overflow):
    """Products and states that become infinite although every input is finite."""
    args = linear_attention_inputs(length=40)
    for name in "qkv":
        args[name][:, 12:26] *= np.float32(overflow)
    operation = functools.partial(linear_attention, implementation="xla")
    check_isolation(operation, args, ("q", "k", "v", "log_decay"), 1e-5)
