"""A trained model, read from its run directory; with the token cache and the tokenizer it is ready to be evaluated."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqmodels import data, job
from seqmodels.config import override
from seqmodels.errors import UserError
from seqmodels.evals.scoring import PositionSums, position_sums
from seqmodels.fields.run import kind_of_data
from seqmodels.model import build_for
from seqmodels.training import identity, metrics, sharding
from seqmodels.training.checkpoint import restore_params, steps
from seqmodels.training.optimizer import averages
from seqmodels.training.run import read_config
from seqmodels.training.state import abstract_params, placed_params

# fields that name a text, in an evaluation on purpose another one
TEXT = ("data.name", "data.path", "data.text_key", "data.mixture")


class RunData(Protocol):
    """What says which evaluators fit a run; known before the training begins.

    Attributes:
      config: of the run.
      dataset: a `seqmodels.data.BatchSource`; of text and tasks with its tokenizer.
    """

    @property
    def config(self) -> ConfigDict: ...

    @property
    def dataset(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class NewRun:
    """`RunData` of a run that is not trained yet."""

    config: ConfigDict
    dataset: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What an evaluator works on.

    Attributes:
      config, dataset: as in `RunData`.
      step: of the checkpoint.
      model, params: as in docs/architecture.md; the averaged parameters where the run keeps them.
      mesh: of all devices; parameters are spread over them.
      batch_size: rows at once.
    """

    config: ConfigDict
    step: int
    dataset: Any
    model: Any
    params: Any
    mesh: Mesh
    batch_size: int
    _sums: dict[tuple[str, int | None], PositionSums] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def position_sums(self, split: str, limit: int | None) -> PositionSums:
        """Scores of a split in rows of the trained length. They are computed once and serve all evaluators."""
        if (split, limit) not in self._sums:
            self._sums[split, limit] = position_sums(
                self.model,
                self.params,
                self.dataset[split],
                length=self.config.seq_len,
                batch_size=self.batch_size,
                limit=limit,
                mesh=self.mesh,
            )
        return self._sums[split, limit]


def load_run(
    workdir: str | Path,
    step: str = "latest",
    batch_size: int = 0,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    dataset: data.BatchSource | None = None,
    text: bool = True,
) -> Run:
    """The model of a run directory.

    Args:
      step: "latest", "best" (by `config.checkpoint.best`) or a number.
      batch_size: rows at once; 0: as the config says.
      overrides: dotted fields of the config's `evaluation` and `data` and their values, in place of the run's.
      dataset: your own, if the run was trained on one; None: what `config.data` names.
      text: whether the text is needed; without it `Run.dataset` has the tokenizer alone, and the text may be gone.

    Raises: UserError if there is no run or no such checkpoint, if the data is no longer there, or if it is not what the
      run was trained on: then other data must be named, by `overrides` or `dataset`, and only its tokenizer must be
      that of the run.
    """
    workdir = Path(workdir).expanduser()
    if any(name in TEXT for name in overrides) and "mixture" in read_config(workdir).data:
        overrides = {"data.mixture": ""} | dict(overrides)  # one text in place of the run's mixture
    config = override(read_config(workdir), overrides)
    number = _checkpoint_step(workdir, config, step)
    other = dataset is not None or any(name in TEXT for name in overrides)
    if kind_of_data(config) == "text" and "data.tokenizer" not in overrides:
        with config.unlocked():
            config.data.tokenizer = identity.tokenizer_of(workdir, config.data.tokenizer)
    if dataset is None:
        load = data.load if text else data.load_unread
        sizes = dict(seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed)
        dataset = job.current().first("loading the data", lambda: load(config.data, **sizes))
    advice = "restore it; other text is measured with --config.data.name and --config.data.path"
    identity.check(workdir, dataset, config.data, advice, parts=("tokenizer",) if other else None)
    model = build_for(config.model, dataset)
    mesh = sharding.flat_mesh()
    abstract = placed_params(abstract_params(model, config), mesh)
    number, params = restore_params(workdir / "checkpoints", abstract, step=number, ema=averages(config.optimizer))
    batch_size = batch_size or rows_at_once(config)
    return Run(config, number, dataset, model, params, mesh, batch_size)


def rows_at_once(config: ConfigDict) -> int:
    """Rows at once in an evaluation: as the config says, or as many as training had in memory at once."""
    return config.evaluation.batch_size or config.batch_size // config.training.accumulate


def _checkpoint_step(workdir: Path, config: ConfigDict, step: str) -> int | None:
    """The number of the checkpoint that `--step` asks for; None: the newest."""
    if step == "latest":
        return None
    if step.isdecimal():
        return int(step)
    if step != "best":
        raise UserError(f"--step={step}: must be latest, best or a number")
    name = config.checkpoint.best
    if not name:
        raise UserError("--step=best: the run was trained without config.checkpoint.best, so no best one was kept")
    there = steps(workdir / "checkpoints")
    rows = [
        row for row in metrics.read(workdir / "metrics.jsonl") if row["step"] in there and row.get(name) is not None
    ]
    if not rows:
        raise UserError(f"--step=best: no checkpoint in {workdir / 'checkpoints'} has a {name}")
    return min(rows, key=lambda row: row[name])["step"]
