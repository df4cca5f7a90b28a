"""Directories with a config.json and weights, as transformers writes (`save_pretrained`) and reads them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from seqmodels.errors import UserError
from seqmodels.interop.huggingface import from_huggingface, to_huggingface


def load(directory: str | Path) -> tuple[dict, dict]:
    """`from_huggingface` of a directory with config.json and *.safetensors, or pytorch_model.bin (which needs torch).

    Raises:
        UserError: files are missing, or contain a model that cannot be converted.
    """
    directory = Path(directory).expanduser()
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json; a directory written by save_pretrained is needed")
    config = json.loads((directory / "config.json").read_text())
    tensors: dict[str, Any] = {}
    if files := sorted(directory.glob("*.safetensors")):
        for file in files:
            tensors |= read_safetensors(file)
    elif (file := directory / "pytorch_model.bin").is_file():
        tensors = read_torch(file)
    else:
        raise UserError(f"{directory} has neither *.safetensors nor pytorch_model.bin")
    return from_huggingface(tensors, config)


def save(directory: str | Path, params: Mapping, model: Mapping) -> None:
    """`to_huggingface` into config.json and model.safetensors, which transformers' `from_pretrained` takes."""
    from safetensors.numpy import save_file

    tensors, config = to_huggingface(params, model)
    directory = Path(directory).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """Every tensor of a .safetensors file, including bfloat16 ones."""
    import ml_dtypes  # noqa: F401  gives numpy its bfloat16
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def read_torch(file: Path) -> dict[str, np.ndarray]:
    """Every tensor of a pytorch_model.bin, as float32."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{file} needs torch to be read: pip install torch, or convert it to safetensors") from None
    return {name: tensor.float().numpy() for name, tensor in torch.load(file, "cpu", weights_only=True).items()}
