"""Which files of a directory hold a model's weights, and what is in them.

The files are those that transformers takes: it looks for model.safetensors, then for the index of several such files,
then for the same of torch. Other files beside them are not read.

A tensor of a file is not in memory: it has a shape and a dtype, and `np.asarray` reads it.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from seqmodels.errors import UserError

INDEX = ".index.json"
NAMES = (
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
)
LFS = b"version https://git-lfs"  # begins a file that Git LFS has not fetched


@dataclasses.dataclass(frozen=True, eq=False)
class FileTensor:
    """A tensor in a file.

    Attributes:
        dtype: its name, such as "bfloat16".
        read: the whole tensor, read anew.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)


def read_tensors(directory: Path, chosen: str | None = None) -> dict[str, Any]:
    """Every tensor of a model by its name.

    Args:
        directory: holds the files.
        chosen: the file or index to read, from `transformers_weights` in config.json. None: the first of `NAMES`.

    Raises:
        UserError: there are no weights, or a file is missing, damaged or outside of the directory.
    """
    names = NAMES if chosen is None else (inside(directory / "config.json", chosen),)
    for name in names:
        if (file := directory / name).is_file():
            return read_index(file) if name.endswith(INDEX) else read_file(file)
    others = sorted(p.name for p in directory.iterdir() if p.suffix in (".safetensors", ".bin", ".gguf", ".pt", ".pth"))
    if not others:
        raise UserError(f"{directory} has neither *.safetensors nor pytorch_model.bin")
    raise UserError(f"{directory} has {', '.join(others)}, but none of {', '.join(names)}, which transformers loads")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. A UserError names the file, and the place of a mistake."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if found.setdefault(name, value) != value:
                raise UserError(f"{file} has {name!r} twice, with different values")
        return found

    try:
        value = json.loads(file.read_bytes().decode(), object_pairs_hook=unique)
    except (OSError, ValueError) as error:  # not JSON, not UTF-8
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} has a {type(value).__name__}; allowed: a JSON object")
    return value


def inside(source: Path, name: str) -> str:
    """A file name that `source` gives, if it stays in the directory; links are followed, as caches are made of them."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise UserError(f"{source} names the file {name!r}; allowed: files in its own directory")
    return name


def read_index(file: Path) -> dict[str, Any]:
    """Every tensor of the files that an index names."""
    index = read_json(file).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise UserError(f"{file} has no weight_map from names of tensors to names of files")
    tensors: dict[str, Any] = {}
    places: dict[str, str] = {}
    for name in dict.fromkeys(inside(file, name) for name in index.values()):
        if not (part := file.parent / name).is_file():
            raise UserError(f"{part} is missing; {file.name} names it")
        for tensor, array in read_file(part).items():
            if tensor in tensors and not same_bits(array, tensors[tensor]):
                raise UserError(f"{file.parent}: {places[tensor]} and {name} have different tensors {tensor}")
            tensors[tensor], places[tensor] = array, name
    for tensor, name in index.items():
        if tensor not in tensors:
            raise UserError(f"{file.parent / name} has no tensor {tensor}, which {file.name} says it has")
    return tensors


def same_bits(a: FileTensor, b: FileTensor) -> bool:
    """Whether two tensors have the same shape, dtype and bytes."""
    return a.shape == b.shape and a.dtype == b.dtype and a.read().tobytes() == b.read().tobytes()


def read_file(file: Path) -> dict[str, FileTensor]:
    """Every tensor of a .safetensors file, or of a file of torch."""
    try:
        with open(file, "rb") as opened:
            start = opened.read(len(LFS))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    if start == LFS:
        raise UserError(f"{file} is a pointer of Git LFS, not the weights; fetch them with git lfs pull")
    return read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)


LETTERS = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint", "C": "complex"}  # of dtypes in safetensors


def read_safetensors(file: Path) -> dict[str, FileTensor]:
    """Every tensor of a .safetensors file. The file is checked as a whole, but no tensor is read."""
    import ml_dtypes  # noqa: F401  gives numpy its bfloat16
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(file, framework="np")
        places = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  it is no mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None

    def tensor(name: str, place: Any) -> FileTensor:
        letters = place.get_dtype().rstrip("0123456789")
        bits = place.get_dtype().removeprefix(letters)
        try:
            dtype = np.dtype(LETTERS.get(letters, letters.lower()) + bits).name
        except TypeError:  # one of 8 bits or fewer
            problem = f"has tensors of a dtype that cannot be converted: {name} is {place.get_dtype()}"
            raise UserError(f"{file} {problem}") from None
        return FileTensor(tuple(place.get_shape()), dtype, lambda: opened.get_tensor(name))

    return {name: tensor(name, place) for name, place in places.items()}


def read_torch(file: Path) -> dict[str, FileTensor]:
    """Every tensor of a file of torch, which maps them into memory; bfloat16 ones as float32, which changes no number.

    Nothing in the file is run: it is loaded with `weights_only=True`.
    """
    try:
        import torch
    except ImportError:
        problem = "needs torch to be read: pip install torch, or convert it to model.safetensors where torch is"
        raise UserError(f"{file} {problem} (safetensors.torch.save_file)") from None
    try:
        try:
            tensors = torch.load(file, "cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6, which cannot be mapped
            tensors = torch.load(file, "cpu", weights_only=True)
    except Exception as error:  # whatever damage does to a zip file or to a pickle
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{file} is not a table of tensors by name, such as torch.save(model.state_dict(), file) makes")

    def tensor(t: Any) -> FileTensor:
        dtype = str(t.dtype).removeprefix("torch.")
        return FileTensor(tuple(t.shape), dtype, lambda: (t.float() if dtype == "bfloat16" else t).numpy(force=True))

    return {name: tensor(t) for name, t in tensors.items()}
