"""Metrics of a run: metrics.jsonl with one row for each step, and the same numbers in TensorBoard and W&B."""

import json
import os
import secrets
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from seqmodels.atomic import replace_file, writing
from seqmodels.errors import UserError


class Metrics:
    """Writes rows. A row is with the system when `write` returns, so a killed process loses no row before the newest
    checkpoint.

    Args:
      workdir: the run directory.
      step: rows after this step are removed; the run, which continues from there, writes them again.
      config: the run's whole config.
      enabled: False on all processes but the first.

    Raises, as its methods: UserError where a file cannot be read or written.
    """

    def __init__(self, workdir: Path, step: int, config: ConfigDict, enabled: bool = True) -> None:
        self._file = self._board = self._wandb = None
        if not enabled:
            return
        again = step >= config.steps  # only the evaluation after the last step is left, and its rows are written again
        if config.metrics.wandb:
            self._wandb = _start_wandb(Path(workdir), config, begun=step > 0)
        self._path = path = Path(workdir) / "metrics.jsonl"
        with writing(path):
            drop_after(path, step, again)
            if config.metrics.tensorboard:
                from seqmodels.training.board import Board

                self._board = Board(Path(workdir), step, again)
            self._file = open(path, "a")  # noqa: SIM115 - it lives as long as the run

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one row. Floats are written with all their digits; what is not finite as null."""
        if self._file is None:
            return
        row = {"step": step} | {name: _number(value) for name, value in values.items()}
        finite = {name: value for name, value in row.items() if value is not None and name != "step"}
        with writing(self._path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            if self._board is not None:
                self._board.write(step, finite)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def sync(self) -> None:
        """Returns when all rows are on the disk itself: before a checkpoint is saved that counts on them."""
        if self._file is None:
            return
        with writing(self._path):
            os.fsync(self._file.fileno())
            if self._board is not None:
                self._board.sync()

    def close(self) -> None:
        for sink in (self._file, self._board):
            if sink is not None:
                with writing(self._path):
                    sink.close()
        if self._wandb is not None:
            self._wandb.finish()


def read(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl, each with a `step`. A last line that a crash cut short is left out; other lines that are
    no rows are too, and a line on stderr says so. Raises: UserError where the file cannot be read.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    *whole, torn = lines  # b"" behind the last line end
    rows = [_row(line) for line in whole]
    if damaged := [
        number for number, (row, line) in enumerate(zip(rows, whole, strict=True), 1) if row is None and line
    ]:
        print(f"{path}: line {damaged[0]} is no row of metrics"
              + (f", nor are {len(damaged) - 1} other lines" if len(damaged) > 1 else "") + "; left out",
              file=sys.stderr, flush=True)  # fmt: skip
    return [row for row in [*rows, _row(torn)] if row is not None]


def _row(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    numbers = isinstance(row, dict) and all(value is None or type(value) in (int, float) for value in row.values())
    return row if numbers and type(row.get("step")) is int else None


def drop_after(path: Path, step: int, again: bool = False) -> None:
    """Removes the rows after `step`, and a row that a crash cut short, by one atomic replacement of the file.

    Args:
      again: whether the rows of the evaluation after `step` are removed too, as it is done again.
    """
    rows = read(path) if path.exists() else []
    if step and not any(row["step"] <= step for row in rows):
        print(f"{path}: the rows up to step {step} are not there", file=sys.stderr, flush=True)
    kept = [row for row in rows if row["step"] <= step and not (again and row["step"] == step and is_final(row))]
    if path.exists():
        replace_file(path, "".join(json.dumps(row) + "\n" for row in kept))


def is_final(row: Iterable[str]) -> bool:
    """Whether a row, given by its names, was written after the last checkpoint.

    It has figures of held-out splits, such as "validation.loss", or of config.evals, such as "eval.memory.bytes". Names
    of other rows have no point before the layer.
    """
    return any("." in name.partition("/")[0] for name in row)


def _number(value) -> float | None:
    # float(np.float32(x)) is the float32 exactly, and Python prints as many digits as it takes to read it back.
    value = float(np.asarray(value))
    return value if np.isfinite(value) else None


def _start_wandb(workdir: Path, config: ConfigDict, begun: bool):
    try:
        import wandb
    except ImportError:
        raise UserError(f"metrics.wandb={config.metrics.wandb}: pip install wandb, or set it to ''") from None
    return wandb.init(
        project=config.metrics.wandb,
        name=_wandb_name(workdir, config),
        group=config.name or None,
        id=_wandb_id(workdir, begun),
        resume="allow",
        dir=str(workdir),
        config=config.to_dict(),
    )


def _wandb_name(workdir: Path, config: ConfigDict) -> str:
    """The run directory's name, with the config's before it where it does not say that: as of trials of a sweep."""
    name = workdir.absolute().name
    return name if config.name in name else f"{config.name}-{name}"


def _wandb_id(workdir: Path, begun: bool) -> str:
    """Identifies the run there. Kept in the run directory: directories of one name in two places are two runs."""
    path = workdir / "wandb-id"
    if path.exists():
        return path.read_text().strip()
    name = workdir.absolute().name
    if not begun:  # runs of older versions go by their directory's name
        name += "-" + secrets.token_hex(4)
        with writing(path):
            replace_file(path, name + "\n")
    return name
