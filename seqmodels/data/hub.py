"""Text of the Hugging Face Hub, through the library `datasets`: config.data.name=hf:org/name, or hf:org/name:config."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from seqmodels.errors import UserError

PREFIX = "hf:"


def open_table(config: ConfigDict, cache: Path, streaming: bool = False) -> Any:
    """What `datasets.load_dataset` gives: tables by split.

    Args:
      cache: where the library keeps what it downloads.
      streaming: whether rows are read over the network when they are needed, and nothing is kept.

    Raises: UserError where the library is not installed, there is no such data set, or it has no such column or train
      split.
    """
    path, _, kind = config.name.removeprefix(PREFIX).partition(":")
    options = dict(streaming=True) if streaming else dict(cache_dir=str(cache / "datasets"))
    library = _library(config.name)
    try:
        table = library.load_dataset(path, kind or None, **options)
    except Exception as error:  # of many types: no network, no such name, no right to read it, a config that is missing
        reason = (str(error).strip() or "no message").splitlines()[0][:200]
        raise UserError(f"config.data.name={config.name!r}: {type(error).__name__}: {reason}") from error
    if "train" not in table:
        raise UserError(f"config.data.name={config.name!r}: has no train split, only {', '.join(table)}")
    columns = table["train"].column_names or [config.text_key]  # a stream may not know them
    if config.text_key not in columns:
        raise UserError(f"config.data.text_key={config.text_key!r}: {config.name!r} has {', '.join(columns)}")
    return table


def texts(rows: Any, text_key: str) -> Iterator[str]:
    """The texts of rows; one without a text has "". Raises: UserError for a row that holds something else."""
    return (text_of(row, text_key) for row in rows)


def text_of(row: Any, text_key: str) -> str:
    """The text of a row. Raises: UserError."""
    value = row.get(text_key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"config.data.text_key={text_key!r}: holds {type(value).__name__}, must be texts")
    return value or ""


def hint(name: str) -> str:
    """For an error about a name that is like one of the Hub, how the Hub's is written; else ""."""
    return (
        f"; of the Hugging Face Hub: config.data.name={PREFIX}{name}"
        if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)
        else ""
    )


def _library(name: str) -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise UserError(f"config.data.name={name!r}: needs datasets: pip install datasets") from None
    return datasets
