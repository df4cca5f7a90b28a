"""The parameters of another run, with which a new run begins (`config.training.start`).

Only parameters are taken: the optimizer begins anew, and the text that the other run was trained on need not be there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from seqmodels.cli import fields
from seqmodels.errors import UserError
from seqmodels.training import checkpoint, identity
from seqmodels.training.optimizer import averages
from seqmodels.training.run import is_free, read_config

FREE = ("model.dropout", "model.dtype", "model.residual_dtype", "model.embedding_std")  # of training, or of fresh ones


def check(config: ConfigDict, dataset: Any, abstract: Any) -> Iterator[str]:
    """Checks that the parameters of `config.training.start` are those of this config's model.

    Args:
      dataset: of the new run.
      abstract: the new run's parameters, as jax.ShapeDtypeStruct.

    Yields: a line for each field by which the model computes something else than that of the other run.

    Raises: UserError where there is no such run, or a parameter or the tokenizer is another.
    """
    named = f"config.training.start={config.training.start}"
    place = _place(config)
    stored = read_config(place, "config.training.start")
    if not checkpoint.steps(place / "checkpoints"):
        raise UserError(f"{named}: there is no checkpoint in it")
    kept, found = (known.get("tokenizer") for known in (identity.read(place), identity.fingerprints(dataset)))
    if kept and found and kept != found:
        tokenizer = f"config.data.tokenizer={config.data.tokenizer!r} and separator={config.data.separator!r}"
        was = f"{stored.data.tokenizer!r} and {stored.data.separator!r}"
        raise UserError(f"{tokenizer}: must be those of training.start, which were {was}")
    if (scan := config.model.scan_blocks) != stored.model.scan_blocks:
        raise UserError(f"config.model.scan_blocks={scan}: must be that of training.start, {stored.model.scan_blocks}")
    _check_shapes(named, checkpoint.param_shapes(place / "checkpoints"), abstract)
    here, there = (dict(fields(c.model, "model.")) for c in (config, stored))
    for name in sorted(here.keys() & there.keys()):
        if here[name] != there[name] and name not in FREE and not is_free(name):
            yield f"warning: config.{name}={here[name]!r}: is {there[name]!r} in training.start"


def params(config: ConfigDict, abstract: Any) -> Any:
    """The parameters, placed as `abstract` says; those that are averaged, where the other run keeps them.

    Raises: UserError where no checkpoint can be read.
    """
    place = _place(config)
    ema = averages(read_config(place, "config.training.start").optimizer)
    return checkpoint.restore_params(place / "checkpoints", abstract, ema=ema)[1]


def _place(config: ConfigDict) -> Path:
    return Path(config.training.start).expanduser()


def _check_shapes(named: str, there: dict[str, tuple[int, ...]], abstract: Any) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    here = {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}
    for name in sorted(here.keys() | there.keys()) if there else ():
        if name not in there:
            raise UserError(f"{named}: has no parameter {name}, which config.model has")
        if name not in here:
            raise UserError(f"{named}: has a parameter {name}, which config.model has not")
        if here[name] != there[name]:
            raise UserError(f"{named}: {name} has the shape {there[name]}, in config.model {here[name]}")
