"""Checkpoints: saved in the background, complete after any crash, checked bit for bit.

A checkpoint is a directory named by its step, with one Orbax item for each part of the state: `params`, `ema` where
there is one, and `rest` (optimizer, step, carry). Every item carries a fingerprint of its own bits, made on the device
before saving, so that damage on disk is seen and never trained on.
"""

import atexit
import contextlib
import errno
import functools
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from seqmodels.errors import UserError
from seqmodels.training.state import TrainState

# Orbax logs the traceback of an error in its threads several times, and raises it too, which is said here in one line.
logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname)


class Checkpoints:
    """The checkpoints of one run, under `directory`. `config` is `config.checkpoint`."""

    def __init__(self, directory: Path, config: ConfigDict) -> None:
        self.directory, self.config = Path(directory).absolute(), config
        self._checkpointer: ocp.training.Checkpointer | None = None
        self._saved: int | None = None

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The newest state that is whole, on the shardings of `abstract`; None where there is no checkpoint.

        Damaged newer checkpoints are reported on stderr and moved to `<directory>-damaged/`.
        Raises: UserError where there are checkpoints, and none can be read; or where the system refuses to read one, as
          for too many open files. Then nothing is moved.
        """
        damaged = []
        for step in steps(self.directory):
            try:
                wanted = parts_of(abstract).items()
                parts = {name: _load(self.directory / str(step), name, part) for name, part in wanted}
            except DamagedError as error:
                print(f"checkpoint {step} is damaged ({error})", file=sys.stderr, flush=True)
                damaged.append(step)
                continue
            if damaged:
                self._set_aside(damaged)
                print(f"falling back to checkpoint {step}", file=sys.stderr, flush=True)
            return TrainState(params=parts["params"], ema=parts.get("ema"), **parts["rest"])
        if damaged:
            raise UserError(
                f"no checkpoint in {self.directory} can be read; restore one from a backup, or move the directory away "
                "to train from the start"
            )
        return None

    def save(self, step: int, state: TrainState, metrics: dict[str, float] | None = None) -> None:
        """Saves in the background, after the last save has ended. Does nothing if the step was saved before."""
        if step == self._saved or step in steps(self.directory):
            return
        if self._checkpointer is None:
            with self._saving():
                self._checkpointer = ocp.training.Checkpointer(
                    _for_orbax(self.directory), preservation_policy=self._preserved(), cleanup_tmp_directories=True
                )
        items = {name: {"arrays": part, "fingerprint": fingerprint(part)} for name, part in parts_of(state).items()}
        with self._saving():  # the error of a save in the background comes with the next
            self._checkpointer.save_checkpointables_async(step, items, force=True, metrics=metrics)
        self._saved = step

    def close(self) -> None:
        """Waits until the last save has ended. Raises: UserError where it could not be written."""
        if self._checkpointer is not None:
            checkpointer, self._checkpointer = self._checkpointer, None
            with self._saving():
                checkpointer.close()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Makes one line of what Orbax and TensorStore raise where a file cannot be written."""
        try:
            yield
        except Exception as error:
            newest = next(iter(steps(self.directory)), None)
            kept = "there is none yet" if newest is None else f"the newest is that of step {newest}"
            reason = system_reason(error) or f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise UserError(f"{self.directory}: the checkpoint cannot be written ({reason}); {kept}") from error

    def _preserved(self):
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(self.config.keep)]
        if self.config.keep_every:
            kept.append(policies.EveryNSteps(self.config.keep_every))
        if self.config.best:  # lower is better; steps without a validation are no candidates
            kept.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[self.config.best],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        return policies.AnyPreservationPolicy(kept)

    def _set_aside(self, damaged: list[int]) -> None:
        if jax.process_index() == 0:
            aside = self.directory.with_name(self.directory.name + "-damaged")
            aside.mkdir(exist_ok=True)
            for step in damaged:
                shutil.rmtree(aside / str(step), ignore_errors=True)
                (self.directory / str(step)).rename(aside / str(step))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")


def restore_params(
    directory: Path, abstract_params: Any, *, step: int | None = None, ema: bool = False
) -> tuple[int, Any]:
    """Reads only the parameters, for evaluation, from the checkpoint of `step` or the newest that is not damaged.

    Args:
      directory: the run's `checkpoints/`.
      abstract_params: tree of jax.ShapeDtypeStruct, with shardings.
      ema: the averaged parameters, where the run keeps them.

    Returns: (step, params).
    Raises: UserError if there is no such checkpoint, or none can be read.
    """
    directory = Path(directory).absolute()
    there = steps(directory)
    if not there or (step is not None and step not in there):
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise UserError(f"{wanted} in {directory}" + (f"; there are {sorted(there)}" if there else ""))
    for candidate in there if step is None else [step]:
        try:
            return candidate, _load(directory / str(candidate), "ema" if ema else "params", abstract_params)
        except DamagedError as error:
            if step is None and not (directory / str(candidate)).exists():  # a run under way has replaced it meanwhile
                return restore_params(directory, abstract_params, ema=ema)
            print(f"checkpoint {candidate} is damaged ({error})", file=sys.stderr, flush=True)
    raise UserError(f"no checkpoint in {directory} can be read")


def save_params(directory: Path, params: Any) -> None:
    """Saves parameters alone, as the checkpoint of step 0, and waits until it is written.

    Raises: UserError where it cannot be written.
    """
    item = {"params": {"arrays": params, "fingerprint": fingerprint(params)}}
    try:
        ocp.save_checkpointables(_for_orbax(Path(directory).absolute()) / "0", item, overwrite=True)
    except Exception as error:
        reason = system_reason(error) or f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError(f"{directory}: the checkpoint cannot be written ({reason})") from error


def param_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter in the newest checkpoint, by its path with slashes; empty if that cannot be known."""
    found: dict[str, tuple[int, ...]] = {}
    for step in steps(directory)[:1]:
        with contextlib.suppress(Exception):  # whatever Orbax raises; `restore_params` says what is wrong
            items: Any = ocp.checkpointables_metadata(_for_orbax(Path(directory).absolute()) / str(step)).metadata
            for path, leaf in jax.tree_util.tree_leaves_with_path(items["params"]["arrays"]):
                found["/".join(key.key for key in path)] = tuple(leaf.shape)
    return found


def steps(directory: Path) -> list[int]:
    """Steps of the finished checkpoints in a directory, newest first."""
    names = [path.name for path in Path(directory).glob("*")]
    # "00041" and the digits of other scripts are names that no run gives.
    return sorted((int(name) for name in names if name.isdecimal() and name == str(int(name))), reverse=True)


def fingerprint(tree: Any) -> jax.Array:
    """One uint32 for each leaf: the sum of its bits modulo 2^32. Does not depend on how the leaf is sharded."""
    return _fingerprint(jax.tree.leaves(tree))


@jax.jit
def _fingerprint(leaves):
    def one(x):
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        return bits.astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jnp.stack([one(leaf) for leaf in leaves])


class DamagedError(Exception):
    """A checkpoint that cannot be read, or is not what was saved."""


def _load(path: Path, name: str, abstract):
    """Item `name` of the checkpoint at `path`. Raises: DamagedError."""
    leaves = jax.tree.leaves(abstract)
    placed = leaves[0].sharding
    replicated = NamedSharding(placed.mesh, PartitionSpec()) if isinstance(placed, NamedSharding) else placed
    target = {
        "arrays": abstract,
        "fingerprint": jax.ShapeDtypeStruct((len(leaves),), jnp.uint32, sharding=replicated),
    }
    try:
        item = ocp.load_checkpointables(_for_orbax(path.parent) / path.name, {name: target})[name]
    except Exception as error:  # whatever Orbax and TensorStore raise for a file that is short, missing or garbled
        if reason := system_reason(error):
            raise UserError(f"{path} cannot be read ({reason}); it may be whole, and was left as it is") from error
        raise DamagedError(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    if (fingerprint(item["arrays"]) != item["fingerprint"]).any():
        raise DamagedError(f"the bits of {name} are not those that were saved")
    return item["arrays"]


@functools.cache
def _for_orbax(directory: Path) -> Path:
    """The same directory without the characters that Orbax takes for patterns of file names: through a link."""
    if not set(str(directory)) & set("[]*?\\"):
        return directory
    folder = Path(tempfile.mkdtemp(prefix="seqmodels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "run").symlink_to(directory.parent)
    return folder / "run" / directory.name


# What the system says of itself and not of the file, in the words of C's library, which all libraries pass on.
REASONS = tuple(
    os.strerror(number)
    for number in (
        errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
        errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN,
    )
)  # fmt: skip


def system_reason(error: BaseException | None) -> str:
    """Such as "Too many open files", from an error or what caused it; "" if it is of another kind."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED: Out of memory" in str(error):
            return os.strerror(errno.ENOMEM)
        if found := next((reason for reason in REASONS if reason in str(error)), ""):
            return found
        error = error.__cause__ or error.__context__
    return ""


def parts_of(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint by name, from a state of arrays or of shapes."""
    rest = {name: getattr(state, name) for name in ("step", "skipped", "opt_state", "carry")}
    parts = {"params": state.params, "rest": rest}
    return parts if state.ema is None else parts | {"ema": state.ema}


def due(config: ConfigDict, step: int, last: int) -> bool:
    """Whether a checkpoint is due after `step` of `last` steps."""
    return step == last or step % config.every == 0 or bool(config.keep_every and step % config.keep_every == 0)
