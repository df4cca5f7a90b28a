"""Sizes that several operations share."""

UNROLLED = 8  # tokens of a call up to which, as in decoding, recurrences are written out token by token
