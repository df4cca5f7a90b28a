"""Run directories from directories of transformers, and back, with the tokenizer.

Parameters are read one after another, straight to the devices that hold them, and on export written in the same way. So
the host holds two or three tensors at a time.
"""

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from seqmodels import data
from seqmodels.atomic import replace_file, writing
from seqmodels.backbone import context, scanned
from seqmodels.config import upgrade, validate
from seqmodels.errors import UserError
from seqmodels.evals.run import load_run
from seqmodels.fields.run import defaults, kind_of_data
from seqmodels.interop import gguf, pretrained, tokenizer
from seqmodels.interop.files import read_json
from seqmodels.interop.huggingface import write_model
from seqmodels.interop.stacking import Stacked, stack_views, unstack_views
from seqmodels.interop.weights import paths
from seqmodels.model import build
from seqmodels.pattern import parse
from seqmodels.training import checkpoint, identity, run, sharding
from seqmodels.training.state import abstract_params, placed_params

SEQ_LEN = 2048  # longest row of an imported run, unless the command asks for more
LEARNING_RATE = 2e-5  # of a training that begins with imported weights
LENGTHS = ("max_position_embeddings", "context_length")  # names that the longest row has in a config.json
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", *LENGTHS)  # of their config.json


def config_of(source: Path, workdir: Path) -> ConfigDict:
    """The config of a run with the model of a directory of transformers, or of a GGUF file.

    `data.tokenizer` is the file in that directory, "" if there is none; or the GGUF file.

    Raises: UserError where the directory has no model that can be imported.
    """
    fields, _, theirs = pretrained.open_model(source)
    config = defaults()
    config.name = workdir.name
    config.model.update(fields)
    positions = next((theirs[name] for name in LENGTHS if name in theirs), None)
    config.seq_len = min(positions, SEQ_LEN) if isinstance(positions, int) and positions > 0 else SEQ_LEN
    config.optimizer.learning_rate = LEARNING_RATE
    if gguf.is_gguf(source):
        config.data.tokenizer, config.data.separator = str(source), gguf.begins_with(source)
        return upgrade(config).lock()
    try:
        found = tokenizer.find(source)
        config.data.tokenizer, config.data.separator = str(found), tokenizer.begins_with(found)
    except UserError:  # another one may be named
        config.data.tokenizer = ""
    return upgrade(config).lock()


def load_words(config: ConfigDict, folder: Path) -> data.Tokenizer:
    """The tokenizer of a result of `config_of`; one in a GGUF file is first written to `folder`."""
    path = config.data.tokenizer
    if gguf.is_gguf(Path(path)):
        path = str(gguf.write_tokenizer(Path(path).expanduser(), folder))
    return data.load_tokenizer(path, config.data.separator)


def import_run(source: Path, workdir: Path, config: ConfigDict) -> int:
    """Makes a run directory with one checkpoint, of step 0, which holds the parameters alone.

    Args:
      config: result of `config_of`; fields that do not change the shape of a parameter may be changed, and
        `model.scan_blocks`.

    Returns: the number of parameters.

    Raises: UserError where the directory holds a run, a file is missing or damaged, or weights or tokenizer do not fit
      the config.
    """
    if not config.data.tokenizer:
        tokenizer.find(source)  # says what is missing
    validate(config)
    with run.held(workdir), tempfile.TemporaryDirectory() as folder:
        if (workdir / "config.json").exists():
            raise UserError(f"--workdir={workdir}: holds a run already; name another directory")
        _, params, theirs = pretrained.open_model(source)
        words = load_words(config, Path(folder))
        model = build(config.model, words.vocab_size)
        abstract = placed_params(abstract_params(model, config), sharding.flat_mesh())
        views = _as_in(model.config, params)
        _check_shapes(views, abstract)
        checkpoint.save_params(workdir / "checkpoints", jax.tree.map(_put, views, abstract))
        with writing(workdir / "config.json"):
            if words.name != "bytes":
                kept = tokenizer.keep(Path(words.name).expanduser(), workdir / "tokenizer")
                config = config.copy_and_resolve_references()
                config.data.tokenizer = str(kept)
            replace_file(workdir / identity.NAME, json.dumps({"tokenizer": words.fingerprint}, indent=2) + "\n")
            about = {"from": str(source), "config": theirs}
            replace_file(workdir / run.IMPORTED, json.dumps(about, indent=2) + "\n")
        run.write_config(workdir, config)
    return sum(leaf.size for leaf in jax.tree.leaves(abstract))


def _as_in(model: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """Unrolled parameters in the layout of a model, whose blocks may be stacked. `model` is config.model."""
    unrolled, repeats = scanned(model)
    return stack_views(params, model.scan_blocks * len(parse(model.pattern)), unrolled) if repeats else dict(params)


def _check_shapes(views: Mapping[str, Any], abstract: Mapping[str, Any]) -> None:
    """Raises UserError for a parameter that the config has and the weights do not have, or with another shape."""
    here, there = ({"/".join(path): leaf for path, leaf in _leaves(tree)} for tree in (abstract, views))
    for name in sorted(here.keys() ^ there.keys()):
        where = "the weights" if name in there else "config.model"
        raise UserError(f"config.model: only {where} has the parameter {name}; leave the fields as they were imported")
    for name, leaf in here.items():
        if leaf.shape != there[name].shape:
            raise UserError(f"config.model: {name} has the shape {leaf.shape}, in the weights {there[name].shape}")


def _leaves(tree: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    for path in paths(tree):
        leaf: Any = tree
        for name in path:
            leaf = leaf[name]
        found.append((path, leaf))
    return found


def _put(view: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """A parameter on its devices. Each device's part is cut from tensors that are read for it."""

    def part(index: Any) -> np.ndarray:
        return view[index] if isinstance(view, Stacked) else np.asarray(view)[index]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)


@dataclasses.dataclass(frozen=True, eq=False)
class OnDevice:
    """A parameter on devices, of which no copy stays in the host's memory after `np.asarray` made one."""

    array: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.array.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the parameter."""
        return self.array.dtype

    def __getitem__(self, row: int) -> np.ndarray:
        return np.asarray(self.array[row])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(jnp.copy(self.array), dtype)  # an array keeps the copy that it once made


def export_run(workdir: Path, directory: Path, step: str = "latest", dtype: str = "float32") -> dict[str, Any]:
    """Writes the model of a run as transformers reads it: config.json, weights and tokenizer.

    Args:
      step: as in `seqmodels.evals.run.load_run`.
      dtype: of the tensors, one of `seqmodels.interop.pretrained.DTYPES`.

    Returns: the step, and whether there is a tokenizer.

    Raises: UserError where there is no such run, transformers has no such model, or the directory holds something else.
    """
    loaded = load_run(workdir, step, text=False)
    params = unstack_views(jax.tree.map(OnDevice, loaded.params))
    model = loaded.model.config
    write_model(params, model)  # refuses here, before anything is written
    text = kind_of_data(loaded.config) == "text"
    notes: dict[str, Any] = {}
    if (length := context(loaded.config)) is not None:
        notes["max_position_embeddings"] = length
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        if text:
            notes |= tokenizer.write(loaded.dataset.tokenizer, directory)
    if (file := workdir / run.IMPORTED).exists():
        theirs = read_json(file).get("config", {})
        notes |= {name: theirs[name] for name in KEPT if name in theirs}
    pretrained.save(directory, params, model, dtype, notes)
    return {"step": loaded.step, "tokenizer": text}
