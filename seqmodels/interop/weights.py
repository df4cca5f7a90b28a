"""The tensors of a model under two names and in two layouts: those of another library ("theirs") and ours.

A Linear of torch holds [out, in]; ours is [in, out], and either axis may be split into several. A depthwise convolution
of torch is [E, 1, W]; ours is [W, E].
"""

import dataclasses
import functools
import itertools
import math
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
        view: shape in which the tensor is seen before it is cut, such as [H, 3, d, D] of a tensor [3 H d, D] that
            holds queries, keys and values head by head. None: `their_shape`.
        cut: index of the part of `view` that this parameter holds; other parts belong to another Weight. (): all.
        slot: index of the part of our parameter that the tensor fills, such as that of one expert; other parts belong
            to another Weight. (): all.
    """

    theirs: str
    their_shape: tuple[int, ...]
    ours: tuple[str, ...]
    our_shape: tuple[int, ...]
    turned: bool = False
    view: tuple[int, ...] | None = None
    cut: tuple[int | slice, ...] = ()
    slot: tuple[int | slice, ...] = ()

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of the part of our parameter that the tensor fills."""
        return np.broadcast_to(np.zeros(()), self.our_shape)[self.slot].shape

    def into(self, tensor: Any) -> np.ndarray:
        """Our float32 parameter, or its part in `slot`, from their whole tensor."""
        tensor = self.part_of(np.asarray(tensor)).astype(np.float32, copy=False)
        if self.turned:
            tensor = tensor.reshape(-1, math.prod(self.their_shape[1:])).T
        return np.ascontiguousarray(tensor.reshape(self.part_shape))

    def back(self, array: Any, whole: np.ndarray) -> None:
        """Write our parameter, or its part in `slot`, to its place in their whole tensor."""
        array, place = np.asarray(array, np.float32)[self.slot], self.part_of(whole)
        if self.turned:
            array = array.reshape(math.prod(self.their_shape[1:]), -1).T
        place[...] = array.reshape(place.shape)

    def part_of(self, tensor: np.ndarray) -> np.ndarray:
        """The part of their whole tensor that this parameter holds, as a view of it."""
        return tensor.reshape(self.view or self.their_shape)[self.cut]


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
        weights.append(Weight(theirs, (total, *rest), path, shape, bool(rest), cut=(slice(start, start + rows),)))
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


@dataclasses.dataclass(frozen=True, eq=False)
class Converted:
    """One of our parameters, float32, which is made from their tensors each time that `np.asarray` asks for it.

    Attributes:
        parts: the tensors that fill it, such as those of all experts of a layer.
    """

    parts: tuple[tuple[Weight, Any], ...]

    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return self.parts[0][0].our_shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = np.empty(self.shape, np.float32)
        for weight, tensor in self.parts:
            if not weight.slot:
                return weight.into(tensor).astype(dtype or np.float32, copy=False)
            whole[weight.slot] = weight.into(tensor)
        return whole.astype(dtype or np.float32, copy=False)


def convert(tensors: Mapping, weights: list[Weight]) -> dict:
    """Our parameters from their tensors, each as `Converted`: nothing is read yet but shapes and dtypes.

    Raises:
        UserError: tensors are missing, unexpected, wrongly shaped, or not of real numbers (such as quantised ones).
    """
    check_names(tensors, weights)
    parts: dict[tuple[str, ...], list[tuple[Weight, Any]]] = {}
    for weight in weights:
        tensor = tensors[weight.theirs]
        if tuple(tensor.shape) != weight.their_shape:
            problem = f"has shape {tuple(tensor.shape)}; the config asks for {weight.their_shape}"
            raise UserError(f"Hugging Face weights: {weight.theirs} {problem}")
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise UserError(f"Hugging Face weights: {weight.theirs} is {dtype}; allowed: {', '.join(DTYPES)}")
        parts.setdefault(weight.ours, []).append((weight, tensor))
    params: dict[str, Any] = {}
    for path, found in parts.items():
        place(params, path, Converted(tuple(found)))
    return params


def arrays_of(params: Mapping) -> dict[str, Any]:
    """The tree with every parameter as an array."""
    return {n: arrays_of(leaf) if isinstance(leaf, Mapping) else np.asarray(leaf) for n, leaf in params.items()}


def export(params: Mapping, weights: list[Weight]) -> Iterator[tuple[str, np.ndarray]]:
    """Name and tensor of theirs, float32, from our parameters, one after another.

    Raises:
        UserError: at once, if parameters are missing or wrongly shaped, or if none of their tensors holds one.
    """
    for weight in weights:
        shape = np.shape(find(params, weight.ours))
        if shape != weight.our_shape:
            problem = f"has shape {shape}; config.model asks for {weight.our_shape}"
            raise UserError(f"parameters: {'/'.join(weight.ours)} {problem}")
    written = {weight.ours for weight in weights}
    for path in paths(params):
        if path not in written:
            raise UserError(f"parameters: {'/'.join(path)} cannot be exported; transformers has no such tensor")
    return _exported(params, weights)


def _exported(params: Mapping, weights: list[Weight]) -> Iterator[tuple[str, np.ndarray]]:
    # the tensors that fill one or two of our parameters, such as those of experts, follow one another
    fetch = functools.lru_cache(maxsize=2)(lambda path: np.asarray(find(params, path)))
    for name, group in itertools.groupby(weights, key=lambda weight: weight.theirs):
        found = list(group)
        whole = np.empty(found[0].their_shape, np.float32)
        for weight in found:
            weight.back(fetch(weight.ours), whole)
        yield name, whole


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
