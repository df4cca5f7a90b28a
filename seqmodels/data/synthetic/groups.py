"""Multiplication tables of small groups."""

import functools
import itertools
import re

import numpy as np

from seqmodels.errors import UserError


def permutations(points: int, even: bool = False) -> np.ndarray:
    """[order, points] int: all permutations in lexicographic order, or the even ones. The first is the identity."""
    every = np.array(list(itertools.permutations(range(points))))
    if not even:
        return every
    inversions = sum(every[:, i] > every[:, j] for i, j in itertools.combinations(range(points), 2))
    return every[inversions % 2 == 0]


def table_of_permutations(group: np.ndarray) -> np.ndarray:
    """[order, order] int: index of the product x y, which applies y first and then x; from `group` [order, points]."""
    number = {tuple(element): i for i, element in enumerate(group.tolist())}
    return np.array([[number[tuple(x[y].tolist())] for y in group] for x in group])


def direct_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Table of A x B; the pair (i, j) has the index i |B| + j."""
    return (a[:, None, :, None] * len(b) + b[None, :, None, :]).reshape(len(a) * len(b), -1)


@functools.cache
def group_table(name: str) -> np.ndarray:
    """[order, order] int32: at [x, y] the product x y; element 0 is the identity.

    Args:
      name: s and a with 2 to 5 points (symmetric, alternating), z with an order up to 1000 (cyclic), or a product of
        such as "a4xz5".

    Raises: UserError for another name.
    """
    tables = []
    for part in name.split("x"):
        match = re.fullmatch(r"([saz])(\d+)", part)
        kind, size = (match[1], int(match[2])) if match else ("", 0)
        if kind == "z" and 1 < size <= 1000:
            tables.append(np.add.outer(np.arange(size), np.arange(size)) % size)
        elif kind in ("s", "a") and 2 <= size <= 5:
            tables.append(table_of_permutations(permutations(size, even=kind == "a")))
        else:
            raise UserError(
                f"config.data.task.group={name!r}: must be s2 to s5, a2 to a5, z2 to z1000, or a product such as a4xz5"
            )
    table = functools.reduce(direct_product, tables).astype(np.int32)
    table.setflags(write=False)
    return table
