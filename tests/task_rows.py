"""Rows of synthetic tasks for tests."""

import numpy as np

from seqmodels.data.synthetic import make_task


def example(name, fields, length, count=200, seed=0):
    """The task of this name, and `count` rows of it."""
    task = make_task(name, fields)
    task.check(length)
    return task, task.rows(np.random.default_rng(seed), count, length)


def words(task, tokens):
    """Names of the tokens."""
    return [task.symbols[token] for token in tokens]


def expect_share(hits, share, count):
    """A share of `count` independent draws, within 5 standard deviations."""
    assert abs(hits - share * count) <= 5 * np.sqrt(count * share * (1 - share)), (hits / count, share)
