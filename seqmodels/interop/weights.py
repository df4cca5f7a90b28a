"""The tensors of a model under two names and in two layouts: those of another library ("theirs") and ours.

A Linear of torch holds [out, in]; ours is [in, out], and either axis may be split into several. A depthwise convolution
of torch is [E, 1, W]; ours is [W, E].
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from seqmodels.errors import UserError


@dataclasses.dataclass(frozen=True)
class Weight:
    """One tensor under both names.

    Attributes:
        theirs, their_shape: name in the file, and shape of the whole tensor there.
        ours, our_shape: path in our parameters, and shape there.
        turned: whether the tensor is transposed: their first axis is our last axes, in the same order.
        rows: first and last + 1 of their rows that this parameter holds; others belong to another Weight. None: all.
    """

    theirs: str
    their_shape: tuple[int, ...]
    ours: tuple[str, ...]
    our_shape: tuple[int, ...]
    turned: bool = False
    rows: tuple[int, int] | None = None

    def into(self, tensor: Any) -> np.ndarray:
        """Our float32 parameter from their whole tensor."""
        tensor = np.asarray(tensor, np.float32)[slice(*self.rows or (None,))]
        if self.turned:
            tensor = tensor.reshape(tensor.shape[0], -1).T
        return np.ascontiguousarray(tensor.reshape(self.our_shape))

    def back(self, array: Any) -> np.ndarray:
        """The rows of their tensor, float32, from our parameter."""
        first, last = self.rows or (0, self.their_shape[0])
        array = np.asarray(array, np.float32)
        if self.turned:
            array = array.reshape(-1, last - first).T
        return np.ascontiguousarray(array.reshape(last - first, *self.their_shape[1:]))


def same(theirs: str, ours: tuple[str, ...], *shape: int) -> Weight:
    """A tensor with the same layout on both sides."""
    return Weight(theirs, shape, ours, shape)


def turned(theirs: str, their_shape: tuple[int, ...], ours: tuple[str, ...], our_shape: tuple[int, ...]) -> Weight:
    """A matrix that torch holds transposed."""
    return Weight(theirs, their_shape, ours, our_shape, turned=True)


def parts(theirs: str, rest: tuple[int, ...], *ours: tuple[tuple[str, ...], int, tuple[int, ...]]) -> list[Weight]:
    """A tensor [rows, *rest] that holds several of our parameters, given in order as (path, rows, our shape)."""
    total, start, weights = sum(rows for _, rows, _ in ours), 0, []
    for path, rows, shape in ours:
        weights.append(Weight(theirs, (total, *rest), path, shape, bool(rest), (start, start + rows)))
        start += rows
    return weights


def demand(config: Mapping, **wanted: Any) -> None:
    """Raise a UserError if a field of their config has a value that our models do not support."""
    for field, allowed in wanted.items():
        if field in config and config[field] not in allowed:
            values = " or ".join(repr(value) for value in allowed)
            raise UserError(f"Hugging Face config: {field} is {config[field]!r}; only {values} can be converted")


def check_names(tensors: Mapping, weights: list[Weight]) -> None:
    """Raise a UserError that names the tensors that are missing or unexpected."""
    wanted = {weight.theirs for weight in weights}
    for problem, names in (("missing", wanted - tensors.keys()), ("unexpected", tensors.keys() - wanted)):
        if names:
            shown = ", ".join(sorted(names)[:4])
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise UserError(f"Hugging Face weights: {problem} {shown}{more}")


def convert(tensors: Mapping, weights: list[Weight]) -> dict:
    """Our parameters from their tensors. A UserError names tensors that are missing, unexpected or wrongly shaped."""
    check_names(tensors, weights)
    params: dict[str, Any] = {}
    for weight in weights:
        tensor = tensors[weight.theirs]
        if tensor.shape != weight.their_shape:
            problem = f"has shape {tensor.shape}; the config asks for {weight.their_shape}"
            raise UserError(f"Hugging Face weights: {weight.theirs} {problem}")
        place(params, weight.ours, weight.into(tensor))
    return params


def export(params: Mapping, weights: list[Weight]) -> dict[str, np.ndarray]:
    """Their tensors from our parameters."""
    rows: dict[str, list[np.ndarray]] = {}
    for weight in weights:
        rows.setdefault(weight.theirs, []).append(weight.back(find(params, weight.ours)))
    return {name: np.concatenate(parts) if len(parts) > 1 else parts[0] for name, parts in rows.items()}


def find(tree: Mapping, path: tuple[str, ...]) -> Any:
    """The leaf at `path`; a UserError if there is none."""
    for i, name in enumerate(path):
        if name not in tree:
            raise UserError(f"parameters: {'/'.join(path[: i + 1])} is missing; scanned blocks must be unstacked first")
        tree = tree[name]
    return tree


def place(tree: dict, path: tuple[str, ...], leaf: Any) -> None:
    """Put `leaf` at `path`, growing the tree where needed."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf
