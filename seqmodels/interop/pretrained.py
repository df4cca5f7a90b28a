"""Directories with a config.json and weights, as transformers writes (`save_pretrained`) and reads them."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from seqmodels.atomic import replace_file
from seqmodels.errors import UserError
from seqmodels.interop.files import INDEX, NAMES, read_json, read_tensors
from seqmodels.interop.huggingface import read_model, write_model
from seqmodels.interop.weights import arrays_of

SHARD_BYTES = 4 * 2**30  # most bytes of a file of weights, unless one tensor has more
DTYPES = ("float32", "bfloat16", "float16")  # in which tensors can be written


def load(directory: str | Path) -> tuple[dict, dict]:
    """`from_huggingface` of a directory with config.json and weights; `files.py` says in which files they may be.

    Raises:
        UserError: files are missing or damaged, or contain a model that cannot be converted.
    """
    fields, params, _ = open_model(directory)
    return fields, arrays_of(params)


def open_model(directory: str | Path) -> tuple[dict, dict, dict]:
    """As `load`, but no parameter is read yet: `np.asarray` makes an array of each. Also returns their config.json."""
    try:
        directory = Path(directory).expanduser()
        if not (directory / "config.json").is_file():
            raise UserError(f"{directory} has no config.json; a directory written by save_pretrained is needed")
        config = read_json(directory / "config.json")
        chosen = config.get("transformers_weights")
        if not isinstance(chosen, str | None):
            file = directory / "config.json"
            raise UserError(f"{file}: transformers_weights is {chosen!r}; allowed: the name of a file")
        tensors = read_tensors(directory, chosen)
    except (OSError, RuntimeError) as error:  # RuntimeError: no such home directory
        raise UserError(f"{directory} cannot be read: {error}") from None
    return *read_model(tensors, config), config


def save(
    directory: str | Path,
    params: Mapping,
    model: Mapping,
    dtype: str = "float32",
    notes: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """`to_huggingface` into config.json and model.safetensors, which transformers' `from_pretrained` takes.

    Weights of more than `shard_bytes` are written in several files with an index. At most one of them is in memory.

    Args:
        dtype: of the tensors that are written, one of `DTYPES`.
        notes: more fields of config.json, such as the ids of special tokens.

    Raises:
        UserError: transformers has no such model, the directory has a config.json of something else, such as a run, or
            it cannot be written.
    """
    tensors, config = write_model(params, model)
    directory = Path(directory).expanduser()
    file = directory / "config.json"
    if file.is_file() and "model_type" not in read_json(file):
        raise UserError(f"{file} is not of a transformers model; choose another directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(directory, tensors, dtype, shard_bytes)
        replace_file(file, json.dumps({**config, "dtype": dtype, **(notes or {})}, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error}") from None


def write_tensors(directory: Path, tensors: Iterable[tuple[str, np.ndarray]], dtype: str, shard_bytes: int) -> None:
    """Write tensors to model.safetensors, or to several such files with an index, and remove those of another model.

    Raises:
        UserError: a file cannot be written. Then the files of before are still there.
    """
    import ml_dtypes  # noqa: F401  gives numpy its bfloat16
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    parts: list[tuple[Path, list[str]]] = []
    total = 0
    try:
        for shard in shards(tensors, np.dtype(dtype), shard_bytes):
            parts.append((directory / f"{NAMES[0]}.{len(parts)}.tmp", list(shard)))
            save_file(shard, parts[-1][0], metadata={"format": "pt"})
            total += sum(tensor.nbytes for tensor in shard.values())
        names = shard_names(len(parts))
        for (temporary, _), name in zip(parts, names, strict=True):
            os.replace(temporary, directory / name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory} cannot be written: {error}") from None
    finally:
        for temporary, _ in parts:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    index = directory / f"{NAMES[0]}{INDEX}"
    if len(parts) == 1:  # transformers looks for the single file first
        index.unlink(missing_ok=True)
        return
    (directory / NAMES[0]).unlink(missing_ok=True)
    places = {tensor: name for (_, held), name in zip(parts, names, strict=True) for tensor in held}
    replace_file(index, json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n")


def shards(
    tensors: Iterable[tuple[str, np.ndarray]], dtype: np.dtype, shard_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    """The tensors in groups of at most `shard_bytes`, or of one."""
    shard: dict[str, np.ndarray] = {}
    for name, tensor in tensors:
        tensor = tensor.astype(dtype, copy=False)
        if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > shard_bytes:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def shard_names(count: int) -> list[str]:
    """Names of so many files of weights."""
    stem, ending = NAMES[0].split(".")
    return [NAMES[0]] if count == 1 else [f"{stem}-{i:05}-of-{count:05}.{ending}" for i in range(1, count + 1)]
