"""The tensors of a model under two names and in two layouts: those of another library ("theirs") and ours.

A Linear of torch holds [out, in]; ours is [in, out], and either axis may be split into several. A depthwise convolution
of torch is [E, 1, W]; ours is [W, E].
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from seqmodels.errors import UserError

DTYPES = ("float32", "bfloat16", "float16", "float64")  # of their tensors; ours become float32


@dataclasses.dataclass(frozen=True)
class Weight:
    """One tensor under both names.

    Attributes:
        theirs, their_shape: name in the file, and shape of the whole tensor there.
        ours, our_shape: path in our parameters, and shape there.
        turned: whether the tensor is transposed: their first axis is our last axes, in the same order.
        rows: first and last + 1 of their rows that this parameter holds; others belong to another Weight. None: all.
        slot: index of the part of our parameter that the tensor fills, such as that of one expert; other parts belong
            to another Weight. (): all.
    """

    theirs: str
    their_shape: tuple[int, ...]
    ours: tuple[str, ...]
    our_shape: tuple[int, ...]
    turned: bool = False
    rows: tuple[int, int] | None = None
    slot: tuple[int | slice, ...] = ()

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of the part of our parameter that the tensor fills."""
        return np.broadcast_to(np.zeros(()), self.our_shape)[self.slot].shape

    def into(self, tensor: Any) -> np.ndarray:
        """Our float32 parameter, or its part in `slot`, from their whole tensor."""
        tensor = np.asarray(tensor, np.float32)[slice(*self.rows or (None,))]
        if self.turned:
            tensor = tensor.reshape(tensor.shape[0], -1).T
        return np.ascontiguousarray(tensor.reshape(self.part_shape))

    def back(self, array: Any) -> np.ndarray:
        """The rows of their tensor, float32, from our parameter."""
        first, last = self.rows or (0, self.their_shape[0])
        array = np.asarray(array, np.float32)[self.slot]
        if self.turned:
            array = array.reshape(-1, last - first).T
        return np.ascontiguousarray(array.reshape(last - first, *self.their_shape[1:]))


def same(theirs: str, ours: tuple[str, ...], *shape: int) -> Weight:
    """A tensor with the same layout on both sides."""
    return Weight(theirs, shape, ours, shape)


def turned(theirs: str, their_shape: tuple[int, ...], ours: tuple[str, ...], our_shape: tuple[int, ...]) -> Weight:
    """A matrix that torch holds transposed."""
    return Weight(theirs, their_shape, ours, our_shape, turned=True)


def head(model: Mapping) -> list[Weight]:
    """The matrix of the logits, unless it is that of the embeddings."""
    V, D = model["vocab_size"], model["width"]
    return [] if model["tie_embeddings"] else [turned("lm_head.weight", (V, D), ("head",), (D, V))]


def parts(theirs: str, rest: tuple[int, ...], *ours: tuple[tuple[str, ...], int, tuple[int, ...]]) -> list[Weight]:
    """A tensor [rows, *rest] that holds several of our parameters, given in order as (path, rows, our shape)."""
    total, start, weights = sum(rows for _, rows, _ in ours), 0, []
    for path, rows, shape in ours:
        weights.append(Weight(theirs, (total, *rest), path, shape, bool(rest), (start, start + rows)))
        start += rows
    return weights


def check_names(tensors: Mapping, weights: list[Weight]) -> None:
    """Raise a UserError that names the tensors that are missing or unexpected."""
    wanted = {weight.theirs for weight in weights}
    for problem, names in (("missing", wanted - tensors.keys()), ("unexpected", tensors.keys() - wanted)):
        if names:
            shown = ", ".join(sorted(names)[:4])
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise UserError(f"Hugging Face weights: {problem} {shown}{more}")


def convert(tensors: Mapping, weights: list[Weight]) -> dict:
    """Our parameters from their tensors.

    Raises:
        UserError: tensors are missing, unexpected, wrongly shaped, or not of real numbers (such as quantised ones).
    """
    check_names(tensors, weights)
    params: dict[str, Any] = {}
    wholes: dict[tuple[str, ...], np.ndarray] = {}  # parameters that several tensors fill
    for weight in weights:
        tensor = tensors[weight.theirs]
        if tuple(tensor.shape) != weight.their_shape:
            problem = f"has shape {tuple(tensor.shape)}; the config asks for {weight.their_shape}"
            raise UserError(f"Hugging Face weights: {weight.theirs} {problem}")
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise UserError(f"Hugging Face weights: {weight.theirs} is {dtype}; allowed: {', '.join(DTYPES)}")
        if not weight.slot:
            place(params, weight.ours, weight.into(tensor))
            continue
        whole = wholes.setdefault(weight.ours, np.empty(weight.our_shape, np.float32))
        whole[weight.slot] = weight.into(tensor)
        place(params, weight.ours, whole)
    return params


def export(params: Mapping, weights: list[Weight]) -> dict[str, np.ndarray]:
    """Their tensors from our parameters.

    Raises:
        UserError: parameters are missing or wrongly shaped, or there is one that none of their tensors holds.
    """
    rows: dict[str, list[np.ndarray]] = {}
    for weight in weights:
        array = find(params, weight.ours)
        if np.shape(array) != weight.our_shape:
            problem = f"has shape {np.shape(array)}; config.model asks for {weight.our_shape}"
            raise UserError(f"parameters: {'/'.join(weight.ours)} {problem}")
        rows.setdefault(weight.theirs, []).append(weight.back(array))
    written = {weight.ours for weight in weights}
    for path in paths(params):
        if path not in written:
            raise UserError(f"parameters: {'/'.join(path)} cannot be exported; transformers has no such tensor")
    return {name: np.concatenate(parts) if len(parts) > 1 else parts[0] for name, parts in rows.items()}


def paths(tree: Mapping, start: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every leaf."""
    for name, subtree in tree.items():
        if isinstance(subtree, Mapping):
            yield from paths(subtree, (*start, name))
        else:
            yield (*start, name)


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
