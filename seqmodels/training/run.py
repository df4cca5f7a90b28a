"""A run directory: its config, and whether a command may continue the run in it."""

import contextlib
import json
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from seqmodels.atomic import replace_file, writing
from seqmodels.claim import RUN, Claim, NoLocksError, holder
from seqmodels.cli import fields
from seqmodels.config import read_stored, upgrade
from seqmodels.errors import UserError

# Fields that change neither the mathematics of a run nor its data: they may differ when a run goes on.
# Names of fields, and of groups with a point behind.
FREE = (
    "name", "steps", "platform", "evals", "checkpoint.", "metrics.", "evaluation.", "sample.", "mesh.", "data.cache",
    "training.debug", "training.hang_after", "training.recheck_every", "training.profile_start",
    "training.profile_steps", "training.nan", "training.xla", "model.implementation.", "model.remat",
    "model.remat_blocks",
)  # fmt: skip


IMPORTED = "imported.json"  # in a run directory whose weights came from elsewhere (seqmodels.interop.runs)


def is_free(field: str) -> bool:
    """Whether a field, given by its dotted name, may differ when a run is continued."""
    return any(field.startswith(name) if name.endswith(".") else field == name for name in FREE)


def check_run(workdir: Path, config: ConfigDict) -> None:
    """Checks that the run in the run directory, if there is one, belongs to this config.

    A run that has neither written a metric nor saved a checkpoint may be replaced by any config.
    Raises: UserError naming the fields that differ.
    """
    workdir = Path(workdir)
    try:
        there = stat.S_ISDIR(workdir.stat().st_mode)
        unbegun = not there or not begun(workdir)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be read ({error.strerror})") from error
    if not there:
        raise UserError(f"--workdir={workdir}: is a file; name a directory")
    if unbegun:
        return
    if (workdir / IMPORTED).exists():
        raise UserError(
            f"--workdir={workdir}: holds imported weights and no training; train in another --workdir, with "
            f"--config.training.start={workdir}"
        )
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
    try:
        return (workdir / "checkpoints").exists() or (workdir / "metrics.jsonl").exists()
    except OSError:  # such as a name that is too long; `check_run` says so
        return False


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """The run directory, made if it is not there, is this job's alone: of several processes the first holds the lock.

    Raises: UserError where another process trains in it, or nothing can be written.
    """
    claim, refused = None, ""
    missing = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    if jax.process_index() == 0:
        try:
            claim = _claim(workdir)
        except UserError as error:
            refused = str(error)
    if _of_first(bool(refused)):
        raise UserError(refused or f"--workdir={workdir}: refused to the first process of the job, which says why")
    try:
        yield
    finally:
        if claim:
            _remove_empty(workdir, missing)
            claim.release()


def _remove_empty(workdir: Path, made: list[Path]) -> None:
    """Removes the lock and the directories that were made for a run of which nothing was written, after a mistake in
    the command."""
    if [path.name for path in workdir.iterdir()] == [RUN]:
        with contextlib.suppress(OSError):  # another process has begun there
            (workdir / RUN).unlink()
            for folder in made:
                folder.rmdir()


def _claim(workdir: Path) -> Claim | None:
    lock = workdir / RUN
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        claim = Claim.named(lock)
    except NoLocksError:
        print(f"{workdir}: this file system has no locks; see to it that no other process trains there",
              file=sys.stderr, flush=True)  # fmt: skip
        return None
    except OSError as error:
        link = f", it is a link to {workdir.readlink()}" if workdir.is_symlink() else ""
        raise UserError(f"--workdir={workdir}: cannot be made or written ({error.strerror}{link})") from error
    if claim is None:
        raise UserError(
            f"--workdir={workdir}: {holder(lock)} trains in it; wait until that has ended, or name another --workdir"
        )
    return claim


def _of_first(answer: bool) -> bool:
    """The answer of the first process of the job, to all."""
    return bool(multihost_utils.broadcast_one_to_all(answer)) if jax.process_count() > 1 else answer


def check_unstarted(workdir: Path) -> None:
    """Raises UserError where a run is to begin, as there is no checkpoint, but one was finished there."""
    if (workdir / "summary.json").exists():
        raise UserError(
            f"--workdir={workdir}: summary.json is of a finished run, but there is no checkpoint to go on from; put "
            "checkpoints/ back, or name another --workdir"
        )


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Makes the run directory, with config.json in it."""
    if jax.process_index() == 0:
        with writing(Path(workdir) / "config.json"):
            Path(workdir).mkdir(parents=True, exist_ok=True)
            replace_file(Path(workdir) / "config.json", json.dumps(_plain(config), indent=2) + "\n")


def read_config(workdir: Path, named: str = "--workdir") -> ConfigDict:
    """The config of a run, locked. Fields that an older run lacks get defaults.

    Args:
      named: the flag or field that names the directory, for the message.

    Raises: UserError if there is none, or the file is damaged.
    """
    try:
        return read_stored(Path(workdir) / "config.json")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{named}={workdir}: no config.json there; it is not a run directory") from None


def _plain(config: ConfigDict) -> dict:
    return json.loads(config.to_json())
