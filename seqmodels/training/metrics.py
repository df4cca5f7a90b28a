"""Metrics of a run: metrics.jsonl with one row for each step, and the same numbers in TensorBoard and W&B."""

import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from seqmodels.atomic import replace_file
from seqmodels.errors import UserError


class Metrics:
    """Writes rows. A row is on disk when `write` returns, so a crash loses no row before the newest checkpoint.

    Args:
      workdir: the run directory.
      step: rows after this step are removed; the run, which continues from there, writes them again.
      config: the run's whole config.
      enabled: False on all processes but the first.
    """

    def __init__(self, workdir: Path, step: int, config: ConfigDict, enabled: bool = True) -> None:
        self._file = self._board = self._wandb = None
        if not enabled:
            return
        if config.metrics.wandb:
            self._wandb = _start_wandb(workdir, config)
        path = Path(workdir) / "metrics.jsonl"
        drop_after(path, step)
        self._file = open(path, "a")  # noqa: SIM115 - it lives as long as the run
        if config.metrics.tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(workdir), purge_step=step + 1, flush_secs=10)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one row. Floats are written with all their digits; what is not finite as null."""
        if self._file is None:
            return
        row = {"step": step} | {name: _number(value) for name, value in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        finite = {name: value for name, value in row.items() if value is not None and name != "step"}
        if self._board is not None:
            for name, value in finite.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def close(self) -> None:
        for sink in (self._file, self._board):
            if sink is not None:
                sink.close()
        if self._wandb is not None:
            self._wandb.finish()


def read(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl. A last line that a crash cut short is left out."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def drop_after(path: Path, step: int) -> None:
    """Removes the rows after `step`, and a row that a crash cut short, by one atomic replacement of the file."""
    if path.exists():
        kept = [json.dumps(row) + "\n" for row in read(path) if row["step"] <= step]
        replace_file(path, "".join(kept))


def _number(value) -> float | None:
    # float(np.float32(x)) is the float32 exactly, and Python prints as many digits as it takes to read it back.
    value = float(np.asarray(value))
    return value if np.isfinite(value) else None


def _start_wandb(workdir, config):
    try:
        import wandb
    except ImportError:
        raise UserError(f"metrics.wandb={config.metrics.wandb}: pip install wandb, or set it to ''") from None
    return wandb.init(
        project=config.metrics.wandb,
        name=config.name,
        id=Path(workdir).absolute().name,
        resume="allow",
        dir=str(workdir),
        config=config.to_dict(),
    )
