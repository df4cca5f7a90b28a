"""The whole of a run: data, model, mesh, state, the steps, and what is shown at the end."""

import contextlib
import time
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqmodels import data, evals
from seqmodels.config import context, upgrade, validate
from seqmodels.errors import UserError
from seqmodels.evals import accuracy, perplexity
from seqmodels.evals import report as evaluation
from seqmodels.evals.run import Run, rows_at_once
from seqmodels.generation import generate
from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.model import build, describe_kernels
from seqmodels.training import checkpoint, flops, report, run, sharding
from seqmodels.training.metrics import Metrics
from seqmodels.training.optimizer import decay_mask, make_optimizer, make_schedule
from seqmodels.training.preemption import Preempted, StopSignal
from seqmodels.training.progress import Progress
from seqmodels.training.state import TrainState, abstract_params, abstract_state, init_state
from seqmodels.training.step import lower_train_step, make_train_step


def train(config: ConfigDict, workdir: str | Path) -> dict:
    """Trains `config` in the run directory `workdir`, going on from its newest checkpoint, and returns its summary.

    Raises:
      UserError: bad input, before anything is compiled; or a loss that is not finite under training.nan="stop", after a
        checkpoint of the last good state.
      Preempted: SIGINT or SIGTERM, after a checkpoint.
    """
    workdir = Path(workdir)
    validate(config)
    config = upgrade(config).lock()
    run.check_run(workdir, config)
    with StopSignal() as stop:
        summary = report.read_summary(workdir)
        if summary is None or summary["steps"] < config.steps:
            try:
                training = _Training(config, workdir, stop)
            except UnsupportedError as error:  # a named kernel that cannot serve these shapes
                raise UserError(f"config.model.implementation.{error}") from error
            summary = training.run()
        _say(report.result(summary))
    return summary


class _Training:
    """One process's part in a run: what the phases of `train` share."""

    def __init__(self, config: ConfigDict, workdir: Path, stop: StopSignal):
        self.config, self.workdir, self.stop = config, workdir, stop
        self.mesh: Mesh = sharding.make_mesh(config)
        self.dataset = data.load(
            config.data,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
            bptt=config.training.bptt,
        )
        self.is_task = isinstance(self.dataset, data.SyntheticDataset)
        self._check_best()
        self._check_sample()
        self.evaluators = evals.find(evals.named(config), "config.evals")
        evals.check(self.evaluators, self, "config.evals")
        self.model = build(config.model, self.dataset.tokenizer.vocab_size)
        self.boxed = abstract_params(self.model, config)
        self.optimizer = make_optimizer(config.optimizer, decay_mask(self.boxed))
        self.abstract = abstract_state(self.model, self.optimizer, config, self.mesh)
        self.checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", config.checkpoint)
        self.peak = flops.peak_flops(self.mesh.devices.flat[0].device_kind, config.model.dtype)
        self.flops_per_step = flops.train_step_flops(self.boxed, config)
        train_step = make_train_step(self.model, self.optimizer, make_schedule(config.optimizer, config.steps), config)
        with self.on_mesh():
            self.lowered = lower_train_step(train_step, self.abstract, config, self.mesh)

    @contextlib.contextmanager
    def on_mesh(self):
        """Under this, the logical axis names of activations mean the mesh's."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(sharding.RULES):
            yield

    def _check_best(self) -> None:
        best = self.config.checkpoint.best
        allowed = ["validation_loss"]  # lower is better
        if not self.is_task:
            allowed += ["validation_bits_per_byte", "validation_perplexity"]
        if best and best not in allowed:
            raise UserError(f"config.checkpoint.best={best!r}: must be {' or '.join(allowed)}")
        if best and not self.config.evaluation.every:
            raise UserError(f"config.checkpoint.best={best!r}: needs validations, set --config.evaluation.every")

    def _check_sample(self) -> None:
        sample, tokenizer = self.config.sample, self.dataset.tokenizer
        if sample.tokens and tokenizer.separator < 0 and not tokenizer.encode(sample.prompt):
            raise UserError(
                f"config.sample.prompt={sample.prompt!r}: must hold a token, as no separator stands before it here; or "
                "set config.sample.tokens=0"
            )

    def run(self) -> dict:
        config = self.config
        state = self.checkpoints.restore(self.abstract)
        run.write_config(self.workdir, config)
        self._announce(state)
        if state is None:
            state = init_state(self.model, self.optimizer, config, self.abstract)
        first = int(state.step)
        self.metrics = Metrics(self.workdir, first, config, enabled=jax.process_index() == 0)
        try:
            with self.on_mesh():
                if first < config.steps:
                    state = self._steps(state, first)
                return self._finish(state)
        finally:
            self.metrics.close()
            self.checkpoints.close()

    def _announce(self, restored: TrainState | None) -> None:
        _say(report.devices(self.mesh))
        for line in describe_kernels(self.config.model, self.mesh.devices.flat[0].platform):
            _say(f"kernel   {line}")
        length = self.config.seq_len
        _say(f"data     {self.config.data.name}, {self.dataset.describe()}")
        _say(f"\n{report.parameter_table(self.abstract.params)}\n")
        _say(f"state    {report.state_bytes(self.model, length):,} bytes a sequence of {length} tokens")
        _say(f"compute  {self.flops_per_step:.3g} floating-point operations a step")
        if restored is not None:
            _say(f"resuming {self.workdir} after step {int(restored.step)}")

    def _steps(self, state: TrainState, first: int) -> TrainState:
        config = self.config
        start = time.monotonic()
        compiled = self.lowered.compile()
        _say(f"compiled in {time.monotonic() - start:.1f} s")

        self.progress = Progress(first, config.steps, enabled=jax.process_index() == 0)
        self.read_at = time.monotonic()
        pending = None  # metrics of the step before, not read until the next step is on its way
        with self.progress, data.prefetch(self.dataset, first) as batches:
            for step in range(first + 1, config.steps + 1):
                self._profile(step, state)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = compiled(state, sharding.put_batch(next(batches), self.mesh))
                self._read(pending, state)
                pending = step, metrics
                stopping = self.stop.asked(step)
                validating = config.evaluation.every and step % config.evaluation.every == 0
                if stopping or validating or checkpoint.due(config.checkpoint, step, config.steps):
                    self._read(pending, state)
                    pending = None
                    # Validation comes before the checkpoint, so that a run killed in between does both again.
                    figures = self._validate(state, step) if validating else None
                    if stopping or checkpoint.due(config.checkpoint, step, config.steps):
                        self.checkpoints.save(step, state, figures)
                    self.read_at = time.monotonic()
                if stopping:
                    self._exit(step)
        return state

    def _read(self, pending: tuple[int, dict] | None, state: TrainState) -> None:
        """Waits for a step's metrics, writes and shows them. Raises UserError if they end the run."""
        if pending is None:
            return
        config, (step, metrics) = self.config, pending
        # loss and the like first; the compiled step returns its metrics in alphabetical order
        names = sorted(metrics, key=lambda name: (name != "loss", name))
        values = {name: np.asarray(metrics[name]).item() for name in names}
        now = time.monotonic()
        seconds, self.read_at = max(now - self.read_at, 1e-9), now
        speed = config.batch_size * config.seq_len / seconds
        values |= {"tokens_per_second": speed, "tokens_per_second_per_device": speed / self.mesh.size}
        if self.peak:
            values["mfu"] = self.flops_per_step / seconds / (self.peak * self.mesh.size)
        bad = [name for name in ("loss", "grad_norm") if not np.isfinite(values[name])]
        if bad or step % config.metrics.every == 0 or step == config.steps:
            self.metrics.write(step, values)
        self.progress.update(step, values["loss"], speed)
        if bad and config.training.nan == "stop":
            good = int(state.step)
            if good > 0:
                self.checkpoints.save(good, state.replace(skipped=state.skipped * 0))
            self.checkpoints.close()
            raise UserError(
                f"{bad[0]} is {values[bad[0]]} at step {step}; the last good state is that of step {good}, saved in "
                f"{self.workdir / 'checkpoints'}. Lower --config.optimizer.learning_rate in a new --workdir, or go on "
                "with --config.training.nan=skip"
            )
        if bad:
            self.progress.write(f"step {step}: {bad[0]} is {values[bad[0]]}, update skipped")

    def _evaluate(self, state: TrainState, split: str, rows: int | None) -> dict[str, float]:
        """What the model makes of a split: the figures that a run reports."""
        params = state.params if state.ema is None else state.ema
        options = dict(
            length=self.config.seq_len,
            batch_size=self.config.evaluation.batch_size or self.config.batch_size,
            limit=rows,
            mesh=self.mesh,
        )
        if self.is_task:
            figures = accuracy.evaluate(self.model, params, self.dataset[split], **options)
            return {name: float(figures[name]) for name in ("loss", "accuracy", "sequence_accuracy")}
        figures = perplexity.evaluate(
            self.model, params, self.dataset[split], tokenizer=self.dataset.tokenizer, **options
        )
        return {name: float(figures[name]) for name in ("loss", "perplexity", "bits_per_byte")}

    def _validate(self, state: TrainState, step: int) -> dict[str, float]:
        figures = self._evaluate(state, "validation", self.config.evaluation.rows)
        row = {f"validation_{name}": value for name, value in figures.items()}
        self.metrics.write(step, row)
        self.progress.write(f"step {step}: validation {report.headline(figures)}")
        return row

    def _finish(self, state: TrainState) -> dict:
        """The figures of a trained model: how it does on what it was not trained on, a sample, a picture."""
        config, step = self.config, int(state.step)
        self.checkpoints.close()
        splits = {}
        for split in self.dataset.held_out:
            splits[split] = self._evaluate(state, split, None)
            if not self.is_task:
                splits[split]["xz_bits_per_byte"] = self.dataset.xz_bits_per_byte(split)
            self._exit_if_noted(step)
        if self.evaluators:
            self._run_evaluators(state, step)
            self._exit_if_noted(step)
        sample = self._sample(state)
        summary = {"name": config.name, "steps": step, "splits": splits, "sample": sample}
        summary["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(self.abstract.params))
        summary["state_bytes_per_sequence"] = report.state_bytes(self.model, config.seq_len)
        summary["plot"] = str(self.workdir / "loss.png")
        if jax.process_index() == 0:
            report.plot_loss(self.workdir, Path(summary["plot"]))
            self._exit_if_noted(step)
            report.write_summary(self.workdir, summary)
        return summary

    def _run_evaluators(self, state: TrainState, step: int) -> None:
        """What `eval.py` would say of this run: eval.json and eval.png, and the numbers in the metrics."""
        config, params = self.config, state.params if state.ema is None else state.ema
        trained = Run(config, step, self.dataset, self.model, params, self.mesh, rows_at_once(config))
        options = dict(splits=self.dataset.held_out, limit=None, out=self.workdir / "eval.json")
        figures, failed = evaluation.evaluate(
            trained, self.evaluators, **options, say=_say, write=jax.process_index() == 0
        )
        for reason in failed:  # the run is as good without
            _say(f"not evaluated: {reason}")
        self.metrics.write(step, dict(evaluation.scalars(figures)))

    def _sample(self, state: TrainState) -> str:
        """The prompt and what the model makes of it, as far as its context goes."""
        sample, tokenizer = self.config.sample, self.dataset.tokenizer
        limit = context(self.config)
        if not sample.tokens:
            return ""
        room = sample.tokens if limit is None else limit - 1 - len(tokenizer.encode(sample.prompt))
        tokens = min(sample.tokens, room)
        if tokens < 1:
            return ""
        return sample.prompt + generate(
            self.model,
            state.params if state.ema is None else state.ema,
            tokenizer,
            sample.prompt,
            tokens=tokens,
            temperature=sample.temperature,
            top_k=sample.top_k,
            top_p=sample.top_p,
            seed=self.config.seed,
            context=limit,
        )

    def _profile(self, step: int, state: TrainState) -> None:
        start = self.config.training.profile_start
        if start and step == start:
            jax.profiler.start_trace(str(self.workdir / "profile"))
        if start and step == start + self.config.training.profile_steps:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self.progress.write(f"profile of {self.config.training.profile_steps} steps: {self.workdir / 'profile'}")

    def _exit_if_noted(self, step: int) -> None:
        if self.stop.noted:
            self._exit(step)

    def _exit(self, step: int) -> None:
        self.checkpoints.close()
        _say(f"stopped after step {step}; the same command goes on from there")
        raise Preempted(step)


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
