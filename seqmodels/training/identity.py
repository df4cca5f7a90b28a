"""Which data a run was trained on: `data.json` in its run directory, the fingerprints of the data by part.

The file of the tokenizer is copied into the run directory, so that the model can be used where the file is gone.

The parts of a text are its splits and its tokenizer. Runs of an earlier version have no such file, and datasets of a
user's own may have no fingerprints: then nothing is compared.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from seqmodels.atomic import replace_file, writing
from seqmodels.errors import UserError
from seqmodels.interop.tokenizer import keep

NAME = "data.json"
TOKENIZER = "tokenizer"  # folder in the run directory


def write(workdir: Path, dataset: Any) -> None:
    """Keeps the fingerprints of a run's dataset, where it has any, and the file of its tokenizer."""
    if (found := fingerprints(dataset)) and jax.process_index() == 0:
        with writing(Path(workdir) / NAME):
            replace_file(Path(workdir) / NAME, json.dumps(found, indent=2) + "\n")
            name = getattr(getattr(dataset, "tokenizer", None), "name", "bytes")
            if (file := Path(name).expanduser()).is_file():
                keep(file, Path(workdir) / TOKENIZER)


def tokenizer_of(workdir: Path, name: str) -> str:
    """The tokenizer `name` of a run's config, or the copy in the run directory where its file is not there any more."""
    copy = Path(workdir) / TOKENIZER
    gone = name != "bytes" and not Path(name).expanduser().exists()
    return str(copy) if gone and copy.is_dir() else name


def check(workdir: Path, dataset: Any, named: ConfigDict, advice: str, parts: Iterable[str] | None = None) -> None:
    """Checks that a dataset is the one of the run in the run directory.

    Args:
      named: `config.data`, which names the data.
      advice: how to go on, the end of the message.
      parts: names of the parts that are compared; None: all.

    Raises: UserError naming the parts that differ.
    """
    kept, found = read(workdir), fingerprints(dataset)
    common = [part for part in found if part in kept and (parts is None or part in parts)]
    if changed := [part for part in common if kept[part] != found[part]]:
        field = "path" if named.get("path") else "name"
        fields = dict.fromkeys("tokenizer" if part == "tokenizer" else field for part in changed)
        places = ", ".join(f"config.data.{field}={named.get(field)!r}" for field in fields)
        raise UserError(f"{places}: differs from what the run in {workdir} read ({', '.join(changed)}); {advice}")


def read(workdir: Path) -> dict[str, str]:
    """The fingerprints of a run; empty where they are not known."""
    try:
        found = json.loads((Path(workdir) / NAME).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def fingerprints(dataset: Any) -> dict[str, str]:
    """Those of a dataset; empty where it has none."""
    return dict(getattr(dataset, "fingerprints", None) or {})
