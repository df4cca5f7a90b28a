"""Measures a model: figures of held-out splits; at the end of a run also evaluators, a sample and a picture."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqmodels import evals, job
from seqmodels.backbone import context
from seqmodels.data.contract import FIGURES
from seqmodels.errors import UserError, describe
from seqmodels.evals import accuracy, perplexity
from seqmodels.evals import figures as head_figures
from seqmodels.evals import report as evaluation
from seqmodels.evals.run import NewRun, Run, rows_at_once
from seqmodels.fields.field import shown
from seqmodels.generation import generate
from seqmodels.training import metrics as rows_of_metrics
from seqmodels.training import report
from seqmodels.training.metrics import Metrics
from seqmodels.training.progress import counted
from seqmodels.training.state import TrainState


def check(config: ConfigDict, dataset: Any) -> None:
    """Raises UserError if a run of `config` on `dataset` cannot be measured as it asks; nothing is compiled."""
    _check_best(config, dataset)
    _check_sample(config, dataset)
    # Evaluators look at the config and the dataset of a run that is yet to come.
    run = NewRun(config, dataset)
    evals.check(evals.find(evals.named(config), "config.evals"), run, "config.evals")


def _check_best(config: ConfigDict, dataset: Any) -> None:
    best = config.checkpoint.best
    allowed = ["validation_loss"]  # lower is better
    if dataset.measured_by == "perplexity":
        allowed += ["validation_bits_per_byte", "validation_perplexity"]
    if best and best not in allowed:
        raise UserError(f"config.checkpoint.best={best!r}: must be {' or '.join(allowed)}")
    if best and not config.evaluation.every:
        raise UserError(f"config.checkpoint.best={best!r}: needs validations, set --config.evaluation.every")
    if config.evaluation.every and "validation" not in dataset.held_out:
        raise UserError(f"config.evaluation.every={config.evaluation.every}: must be 0, the dataset has no validation")


def _check_sample(config: ConfigDict, dataset: Any) -> None:
    sample, tokenizer = config.sample, _tokenizer(dataset)
    if not sample.tokens or not tokenizer:
        return
    try:
        ids = tokenizer.encode(sample.prompt)
    except (UserError, ValueError) as error:  # names that a task does not have
        raise UserError(f"config.sample.prompt={shown(sample.prompt)}: {describe(error)}") from error
    if tokenizer.separator < 0 and not ids:
        raise UserError(
            f"config.sample.prompt={sample.prompt!r}: must hold a token, as no separator stands before it here; or "
            "set config.sample.tokens=0"
        )
    if outside := [i for i in ids if not 0 <= i < tokenizer.vocab_size]:
        raise UserError(
            f"config.sample.prompt={shown(sample.prompt)}: the tokenizer makes id {outside[0]} of it, and has only "
            f"{tokenizer.vocab_size}"
        )


def _tokenizer(dataset: Any) -> Any:
    """The tokenizer, if the data are texts or tokens that a model can continue; else None."""
    return getattr(dataset, "tokenizer", None) if dataset.objective == "next_token" else None


class Watched:
    """A split; the first process shows how much of it was read, and after each batch `after` is called."""

    def __init__(self, split: Any, name: str, after: Callable[[], None]) -> None:
        self._split, self._name, self._after = split, name, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._split, name)

    def windows(self, length: int, batch_size: int = 1, limit: int | None = None) -> Iterator[Any]:
        """As of the split."""
        rows = self._split.row_count(length)
        total = -(-(rows if limit is None else min(rows, limit)) // batch_size)
        return self._counted(self._split.windows(length, batch_size, limit), total)

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Any]:
        """As of the split."""
        return self._counted(self._split.batches(batch_size, limit), None)

    def _counted(self, batches: Iterator[Any], total: int | None) -> Iterator[Any]:
        return counted(batches, total, self._name, self._after, shown=job.current().main)


class Finish:
    """Measures a model on the splits of its dataset.

    Args:
      params of the methods: unboxed; the averaged ones where the run keeps them.
      say: is given each line for the terminal.
    """

    def __init__(
        self, config: ConfigDict, workdir: Path, dataset: Any, model: Any, mesh: Mesh, say: Callable[[str], None]
    ) -> None:
        self.config, self.workdir, self.dataset = config, workdir, dataset
        self.model, self.mesh, self.say = model, mesh, say

    def figures(
        self, params: Any, split: str, rows: int | None, after: Callable[[], None] | None = None
    ) -> dict[str, float]:
        """The figures of a split, "loss" first.

        Args:
          rows: the most rows that are read; None: all.
          after: is called after each batch, and how far it has come is shown; None: neither.
        """
        config, by = self.config, self.dataset.measured_by
        options = dict(batch_size=config.evaluation.batch_size or config.batch_size, limit=rows, mesh=self.mesh)
        part = self.dataset[split]
        if after is not None:
            part = Watched(part, split, after)
        if by == "head":
            return head_figures.evaluate(self.model, params, part, reset=config.data.reset, **options)
        options["length"] = config.seq_len
        if by == "accuracy":
            found = accuracy.evaluate(self.model, params, part, **options)
        else:
            found = perplexity.evaluate(self.model, params, part, **options)
        return {name: float(found[name]) for name in FIGURES[by]}

    def run(self, state: TrainState, metrics: Metrics, between: Callable[[], None]) -> dict:
        """Measures all held-out splits, runs the evaluators, draws a sample and a picture, and writes the summary.

        Args:
          between: is called after each batch and part, by all processes of a job alike; it may end the process.
        """
        config, step = self.config, int(state.step)
        params = state.params if state.ema is None else state.ema
        self.failed: list[str] = []
        splits: dict[str, dict[str, float]] = {}
        summary: dict[str, Any] = {"name": config.name, "steps": step, "splits": splits, "sample": ""}
        if config.evaluation.limit:
            summary["rows"] = config.evaluation.limit
        for split in self.dataset.held_out:
            with self._reported(split):
                splits[split] = self.figures(params, split, self.config.evaluation.limit or None, between)
                if self.dataset.measured_by == "perplexity":
                    splits[split]["xz_bits_per_byte"] = self.dataset.xz_bits_per_byte(split)
            between()
        with self._reported("metrics"):
            row = {f"{split}.{name}": value for split, figures in splits.items() for name, value in figures.items()}
            metrics.write(step, {name: value for name, value in row.items() if not name.endswith("xz_bits_per_byte")})
        if named := evals.named(config):
            with self._reported("config.evals"), job.current().visiting("evaluators"):
                self._run_evaluators(evals.find(named, "config.evals"), params, step, metrics)
            between()
        with self._reported("sample"):
            summary["sample"] = self._sample(params)
        summary["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
        with self._reported("state"):
            summary["state_bytes_per_sequence"] = report.state_bytes(self.model, config.seq_len)
        if job.current().main:
            units = dict(next_token="nats a token", rebuild="nats a token", classify="nats a row", pair="nats a row")
            unit = units.get(self.dataset.objective, "squared error")
            with self._reported("loss.png"):
                report.plot_loss(self.workdir, self.workdir / "loss.png", unit)
                summary["plot"] = str(self.workdir / "loss.png")
            if self.failed:
                summary["failed"] = self.failed
            summary["status"] = "diverged" if report.diverged(summary) or self._ended_badly(step) else "done"
            report.write_summary(self.workdir, summary)
        return summary

    def _ended_badly(self, step: int) -> bool:
        """Whether the loss of the last step is not finite, under training.nan="skip"."""
        rows = [row for row in rows_of_metrics.read(self.workdir / "metrics.jsonl") if "loss" in row]
        return bool(rows) and rows[-1]["step"] == step and rows[-1]["loss"] is None

    @contextlib.contextmanager
    def _reported(self, part: str) -> Iterator[None]:
        """What fails inside ends nothing: the run is as good without it. It is said in a line and in the summary."""
        try:
            yield
        except Exception as error:  # of any type: devices, files, libraries of pictures, evaluators of a user's own
            self.failed.append(f"{part}: {describe(error)}")
            self.say(f"not measured: {self.failed[-1]}")

    def _run_evaluators(self, evaluators: dict, params: Any, step: int, metrics: Metrics) -> None:
        """Does what `eval.py` does: writes eval.json and eval.png. The numbers go into the metrics too."""
        config = self.config
        trained = Run(config, step, self.dataset, self.model, params, self.mesh, rows_at_once(config))
        found, failed = evaluation.evaluate(
            trained,
            evaluators,
            splits=list(self.dataset.held_out),
            limit=config.evaluation.limit or None,
            out=self.workdir / "eval.json",
            say=self.say,
            write=job.current().main,
        )
        for reason in failed:
            self.failed.append(reason)
            self.say(f"not evaluated: {reason}")
        metrics.write(step, dict(evaluation.scalars(found)))

    def _sample(self, params: Any) -> str:
        """The prompt and its continuation by the model, within its context; "" for data that cannot be continued."""
        sample, tokenizer = self.config.sample, _tokenizer(self.dataset)
        limit = context(self.config)
        if not sample.tokens or tokenizer is None:
            return ""
        room = sample.tokens if limit is None else limit - 1 - len(tokenizer.encode(sample.prompt))
        tokens = min(sample.tokens, room)
        if tokens < 1:
            return ""
        return sample.prompt + generate(
            self.model,
            params,
            tokenizer,
            sample.prompt,
            tokens=tokens,
            temperature=sample.temperature,
            top_k=sample.top_k,
            top_p=sample.top_p,
            seed=self.config.seed,
            context=limit,
        )
