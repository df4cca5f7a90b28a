"""Sizes that several operations share."""

UNROLLED = 8  # recurrences over at most so many tokens, as in decoding, are unrolled token by token
