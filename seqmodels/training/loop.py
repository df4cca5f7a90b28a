"""A training run: data, model, mesh, state and the steps. `finish.py` measures the model."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqmodels import data, plausible
from seqmodels.config import upgrade, validate
from seqmodels.data.contract import check_spec
from seqmodels.errors import UserError
from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.model import build_for, describe_kernels
from seqmodels.training import checkpoint, debug, finish, flops, identity, report, run, sharding
from seqmodels.training.metrics import Metrics
from seqmodels.training.optimizer import decay_mask, make_optimizer, make_schedule
from seqmodels.training.preemption import Preempted, StopSignal
from seqmodels.training.progress import Progress
from seqmodels.training.state import TrainState, abstract_params, abstract_state, init_state
from seqmodels.training.step import lower_train_step, make_train_step


def train(config: ConfigDict, workdir: str | Path, dataset: data.BatchSource | None = None) -> dict:
    """Trains `config` in the run directory `workdir`, from its newest checkpoint if there is one; returns the summary.

    Args:
      dataset: your own, see `seqmodels.data.contract`; None: what `config.data` names.

    Raises:
      UserError: bad input, before anything is compiled; or a loss that is not finite under training.nan="stop", after a
        checkpoint of the last good state.
      Preempted: SIGINT or SIGTERM, after a checkpoint.
    """
    workdir = Path(workdir)
    begun = run.begun(workdir)
    validate(config, begun)
    config = upgrade(config).lock()
    run.check_run(workdir, config)
    with StopSignal() as stop:
        summary = report.read_summary(workdir)
        if summary is None or summary["steps"] < config.steps:
            for line in plausible.doubts(config, begun):
                _say(line)
            try:
                trainer = Trainer(config, workdir, stop, dataset)
            except UnsupportedError as error:  # a named kernel that cannot serve these shapes
                raise UserError(f"config.model.implementation.{error}") from error
            summary = trainer.run()
        _say(report.result(summary))
    return summary


class Trainer:
    """Runs the steps of a run, as one process of the job."""

    def __init__(self, config: ConfigDict, workdir: Path, stop: StopSignal, dataset: data.BatchSource | None) -> None:
        self.config, self.workdir, self.stop = config, workdir, stop
        self.mesh: Mesh = sharding.make_mesh(config)
        self.source = config.data.name if dataset is None else type(dataset).__name__
        self.dataset = _load(config) if dataset is None else dataset
        if run.begun(workdir):
            identity.check(workdir, self.dataset, config.data, "restore it, or name another --workdir")
        _check_objective(config, self.dataset)
        finish.check(config, self.dataset)
        self.model = build_for(config.model, self.dataset)
        self.finish = finish.Finish(config, workdir, self.dataset, self.model, self.mesh, _say)
        boxed = abstract_params(self.model, config)
        self.optimizer = make_optimizer(config.optimizer, decay_mask(boxed))
        self.abstract = abstract_state(self.model, self.optimizer, config, self.mesh)
        self.checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", config.checkpoint)
        self.peak = flops.peak_flops(self.mesh.devices.flat[0].device_kind, config.model.dtype)
        self.flops_per_step = flops.train_step_flops(boxed, config)
        train_step = make_train_step(self.model, self.optimizer, make_schedule(config.optimizer, config.steps), config)
        self.debug = debug.mode(config)
        lower = debug.NotCompiled if self.debug == "nojit" else lower_train_step
        with self.on_mesh():
            self.lowered = lower(train_step, self.abstract, config, self.mesh, self.dataset.spec)

    @contextlib.contextmanager
    def on_mesh(self) -> Iterator[None]:
        """A context in which the logical axis names of activations are mapped to the axes of the mesh."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(sharding.RULES):
            yield

    def run(self) -> dict:
        config = self.config
        state = self.checkpoints.restore(self.abstract)
        run.write_config(self.workdir, config)
        identity.write(self.workdir, self.dataset)
        self._announce(state)
        if state is None:
            state = init_state(self.model, self.optimizer, config, self.abstract)
        first = int(state.step)
        self.metrics = Metrics(self.workdir, first, config, enabled=jax.process_index() == 0)
        try:
            with self.on_mesh():
                if first < config.steps:
                    state = self._steps(state, first)
                return self._end(state)
        finally:
            self.metrics.close()
            self.checkpoints.close()

    def _announce(self, restored: TrainState | None) -> None:
        _say(report.devices(self.mesh))
        for line in describe_kernels(self.config.model, self.mesh.devices.flat[0].platform):
            _say(f"kernel   {line}")
        length = self.config.seq_len
        _say(f"data     {self.source}, {self.dataset.describe()}")
        _say(f"\n{report.parameter_table(self.abstract.params)}\n")
        _say(f"state    {report.state_bytes(self.model, length):,} bytes a sequence of {length} tokens")
        _say(f"compute  {self.flops_per_step:.3g} floating-point operations a step")
        if self.debug == "shapes":
            with self.on_mesh():
                _say(f"\n{debug.shape_table(self.model, self.config, self.dataset.batch(0))}\n")
        if restored is not None:
            _say(f"resuming {self.workdir} after step {int(restored.step)}")

    def _steps(self, state: TrainState, first: int) -> TrainState:
        config = self.config
        start = time.monotonic()
        compiled = self.lowered.compile()
        if self.debug != "nojit":
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
            message = f"{bad[0]} is {values[bad[0]]} at step {step}; "
            if self.debug == "nans":
                batch = self.dataset.batch(good)
                raise UserError(message + debug.first_not_finite(self.model, config, state, batch))
            raise UserError(
                f"{message}the last good state is that of step {good}, saved in {self.workdir / 'checkpoints'}. Lower "
                "--config.optimizer.learning_rate in a new --workdir, go on with --config.training.nan=skip, or find "
                "the layer with --config.training.debug=nans"
            )
        if bad:
            self.progress.write(f"step {step}: {bad[0]} is {values[bad[0]]}, update skipped")

    def _validate(self, state: TrainState, step: int) -> dict[str, float]:
        params = state.params if state.ema is None else state.ema
        figures = self.finish.figures(params, "validation", self.config.evaluation.rows)
        row = {f"validation_{name}": value for name, value in figures.items()}
        self.metrics.write(step, row)
        self.progress.write(f"step {step}: validation {report.headline(figures)}")
        return row

    def _end(self, state: TrainState) -> dict:
        """Measures and draws what is due after the last step."""
        self.checkpoints.close()
        return self.finish.run(state, self.metrics, between=lambda: self._exit_if_noted(int(state.step)))

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


def _load(config: ConfigDict) -> data.BatchSource:
    """The dataset that a config names."""
    sizes = dict(seq_len=config.seq_len, batch_size=config.batch_size)
    return data.load(config.data, **sizes, seed=config.seed, bptt=config.training.bptt)


def _check_objective(config: ConfigDict, dataset: data.BatchSource) -> None:
    """Raises UserError where the dataset's batches are not those of the config."""
    check_spec(dataset.spec, config.batch_size, config.seq_len)
    if config.training.bptt and dataset.objective != "next_token":
        raise UserError(
            f"config.training.bptt=True: must be False with config.model.head={dataset.objective!r}, whose rows do not "
            "go on"
        )


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
