"""Directories with a config.json and weights, as transformers writes (`save_pretrained`) and reads them."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from seqmodels.atomic import replace_file
from seqmodels.errors import UserError
from seqmodels.interop.files import NAMES, read_json, read_tensors
from seqmodels.interop.huggingface import from_huggingface, to_huggingface


def load(directory: str | Path) -> tuple[dict, dict]:
    """`from_huggingface` of a directory with config.json and weights; `files.py` says in which files they may be.

    Raises:
        UserError: files are missing or damaged, or contain a model that cannot be converted.
    """
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
    return from_huggingface(tensors, config)


def save(directory: str | Path, params: Mapping, model: Mapping) -> None:
    """`to_huggingface` into config.json and model.safetensors, which transformers' `from_pretrained` takes.

    Raises:
        UserError: transformers has no such model, the directory has a config.json of something else, such as a run, or
            it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    tensors, config = to_huggingface(params, model)
    directory = Path(directory).expanduser()
    file = directory / "config.json"
    if file.is_file() and "model_type" not in read_json(file):
        raise UserError(f"{file} is not of a transformers model; choose another directory")
    temporary = directory / f"{NAMES[0]}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.replace(temporary, directory / NAMES[0])
        replace_file(file, json.dumps(config, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{directory} cannot be written: {error}") from None
