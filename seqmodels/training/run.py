"""A run directory: its config, and whether a command may continue the run in it."""

import json
from pathlib import Path

import jax
from ml_collections import ConfigDict

from seqmodels.atomic import replace_file
from seqmodels.cli import fields
from seqmodels.config import upgrade
from seqmodels.errors import UserError

# Fields that change neither the mathematics of a run nor its data: they may differ when a run goes on.
# Names of fields, and of groups with a point behind.
FREE = (
    "name", "steps", "platform", "evals", "checkpoint.", "metrics.", "evaluation.", "sample.", "mesh.", "data.cache",
    "training.debug", "training.profile_start", "training.profile_steps", "training.nan", "model.implementation.",
    "model.remat", "model.remat_blocks",
)  # fmt: skip


def is_free(field: str) -> bool:
    """Whether a field, given by its dotted name, may differ when a run is continued."""
    return any(field.startswith(name) if name.endswith(".") else field == name for name in FREE)


def check_run(workdir: Path, config: ConfigDict) -> None:
    """Checks that the run in the run directory, if there is one, belongs to this config.

    A run that has neither written a metric nor saved a checkpoint may be replaced by any config.
    Raises: UserError naming the fields that differ.
    """
    workdir = Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: is a file; name a directory")
    if not begun(workdir):
        return
    stored, asked = (dict(fields(ConfigDict(_plain(c)))) for c in (read_config(workdir), upgrade(config)))
    missing = "(not there)"
    differ = [
        f"{name}={asked.get(name, missing)} (was {stored.get(name, missing)})"
        for name in sorted(stored.keys() | asked.keys())
        if not is_free(name) and stored.get(name, missing) != asked.get(name, missing)
    ]
    if differ:
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise UserError(
            f"--workdir={workdir}: holds a run of another config: {', '.join(differ[:5])}{more}; "
            "name another --workdir, or set these as they were"
        )


def begun(workdir: Path) -> bool:
    """Whether a run in this directory has written a metric or saved a checkpoint."""
    return (workdir / "checkpoints").exists() or (workdir / "metrics.jsonl").exists()


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Makes the run directory, with config.json in it."""
    if jax.process_index() == 0:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        replace_file(Path(workdir) / "config.json", json.dumps(_plain(config), indent=2) + "\n")


def read_config(workdir: Path) -> ConfigDict:
    """The config of a run, locked. Fields that an older run lacks get defaults. Raises: UserError if there is none."""
    path = Path(workdir) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"--workdir={workdir}: no config.json there; it is not a run directory") from None
    except OSError as error:
        raise UserError(f"--workdir={workdir}: {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    return upgrade(config).lock()


def _plain(config: ConfigDict) -> dict:
    return json.loads(config.to_json())
