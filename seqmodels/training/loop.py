"""A training run: data, model, mesh, state and the steps. `finish.py` measures the model."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqmodels import cloud, data, job, pattern, plausible, source
from seqmodels.branches import BRANCHES
from seqmodels.config import upgrade, validate
from seqmodels.data.contract import check_spec
from seqmodels.errors import NOT_FINITE, UserError
from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.model import build_for, describe_kernels
from seqmodels.training import (
    checkpoint,
    debug,
    finish,
    flops,
    goodput,
    identity,
    profile,
    report,
    run,
    sharding,
    start,
    xla,
)
from seqmodels.training.metrics import Metrics
from seqmodels.training.optimizer import make_optimizer, make_schedule
from seqmodels.training.preemption import Preempted, StopSignal
from seqmodels.training.progress import Progress
from seqmodels.training.recheck import Recheck
from seqmodels.training.state import TrainState, abstract_params, abstract_state, init_state, not_finite, state_from
from seqmodels.training.step import lower_train_step, make_train_step

LOWER = "Lower --config.optimizer.learning_rate in a new --workdir"


def train(config: ConfigDict, workdir: str | Path, dataset: data.BatchSource | None = None) -> dict:
    """Trains `config` in the run directory `workdir`, from its newest checkpoint if there is one; returns the summary.

    Args:
      workdir: a folder, or an address in a cloud such as gs://bucket/run (`seqmodels.cloud`).
      dataset: your own, see `seqmodels.data.contract`; None: what `config.data` names.

    Raises:
      UserError: bad input, before anything is compiled; another process trains in the directory; or a loss that is not
        finite under training.nan="stop", after a checkpoint of the last good state, or at the end.
      Preempted: SIGINT or SIGTERM, after a checkpoint.
    """
    if cloud.is_cloud(workdir):
        return _in_cloud(config, str(workdir), dataset)
    return _in_folder(config, Path(workdir).expanduser(), dataset)


def _in_cloud(config: ConfigDict, address: str, dataset: data.BatchSource | None) -> dict:
    """Trains in a copy of the run directory. The cloud gets what is new after each checkpoint and at the end."""
    if jax.process_count() > 1:
        raise UserError(f"--workdir={address}: several processes need a folder that all share (docs/howto.md)")
    with cloud.copied(address) as copy:
        _say(f"copy     of {address}: {copy.folder}")
        try:
            return _in_folder(config, copy.folder, dataset, copy.send)
        finally:
            if copy.folder.exists():
                copy.send()


def _in_folder(
    config: ConfigDict, workdir: Path, dataset: data.BatchSource | None, saved: Callable[[], None] | None = None
) -> dict:
    """What `train` does, in a folder. `saved` is called behind each checkpoint."""
    validate(config, run.begun(workdir))
    config = upgrade(config).lock()
    job.current().check_shared("--workdir", workdir)
    if (summary := _finished(workdir, config)) is None:
        with run.held(workdir):
            # Once more, as another process may have ended meanwhile.
            summary = _finished(workdir, config) or _trained(config, workdir, dataset, saved)
    _say(report.result(summary))
    if reason := report.diverged(summary):
        raise UserError(f"--workdir={workdir}: the run is not done, {reason}")
    return summary


def _finished(workdir: Path, config: ConfigDict) -> dict | None:
    """The summary of a run that has no steps left; None where there are some. Raises UserError, see check_run."""
    run.check_run(workdir, config)
    summary = report.read_summary(workdir)
    return summary if summary is not None and summary["steps"] >= config.steps else None


def _trained(
    config: ConfigDict, workdir: Path, dataset: data.BatchSource | None, saved: Callable[[], None] | None
) -> dict:
    for line in plausible.doubts(config, run.begun(workdir)):
        _say(line)
    try:
        trainer = Trainer(config, workdir, StopSignal(), dataset, saved)
    except UnsupportedError as error:  # a named kernel that cannot serve these shapes
        raise UserError(f"config.model.implementation.{error}") from error
    return trainer.run()


class Trainer:
    """Runs the steps of a run, as one process of the job."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        stop: StopSignal,
        dataset: data.BatchSource | None,
        saved: Callable[[], None] | None = None,
    ) -> None:
        self.config, self.workdir, self.stop, self.saved, self.job = config, workdir, stop, saved, job.current()
        self.job.at(0, "start")
        self.mesh: Mesh = sharding.make_mesh(config)
        self.source = _source_name(config) if dataset is None else type(dataset).__name__
        self.dataset = _load(config) if dataset is None else dataset
        newest = str(next(iter(checkpoint.steps(workdir / "checkpoints")), "none"))
        self.job.agree("the run", {**self.dataset.fingerprints, "the newest checkpoint": newest})
        if run.begun(workdir):
            identity.check(workdir, self.dataset, config.data, "restore it, or name another --workdir")
        _check_objective(config, self.dataset)
        finish.check(config, self.dataset)
        self.model = build_for(config.model, self.dataset)
        self.finish = finish.Finish(config, workdir, self.dataset, self.model, self.mesh, _say_anyway)
        boxed = abstract_params(self.model, config)
        self.optimizer = make_optimizer(config.optimizer, boxed, make_schedule(config.optimizer, config.steps))
        self.abstract = abstract_state(self.model, self.optimizer, config, self.mesh, boxed)
        sharding.check_used(self.abstract.params, self.mesh)
        if config.training.start and not run.begun(workdir):
            for line in start.check(config, self.dataset, self.abstract.params):
                _say(line)
        self.recheck = Recheck(config.training.recheck_every, self.mesh)
        self.checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", config.checkpoint)
        branches = (BRANCHES[name] for name in pattern.names(config.model.pattern))
        self.warnings = {figure: text for branch in branches for figure, text in branch.warnings.items()}
        self.warned: set[str] = set()
        self.peak = flops.peak_flops(self.mesh.devices.flat[0].device_kind, config.model.dtype)
        self.flops_per_step = flops.train_step_flops(boxed, config)
        schedule = make_schedule(config.optimizer, config.steps)
        train_step = make_train_step(self.model, self.optimizer, schedule, config, boxed)
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
        if state is None:
            run.check_unstarted(self.workdir)
        run.write_config(self.workdir, config)
        identity.write(self.workdir, self.dataset)
        self._announce(state)
        if state is None:
            state = self._first_state()
        first, main = int(state.step), self.job.main
        if main:
            source.write(self.workdir, first)
        self.job.at(first, "compile")
        with self.on_mesh():
            compiled = self._compiled() if first < config.steps else None
        self.job.at(first, "start")
        self.life = goodput.Life(self.workdir, self.job, first, config.batch_size * config.seq_len, self.mesh.size)
        self.life.note(first)
        self.metrics = Metrics(self.workdir, first, config, enabled=main)
        self.progress = Progress(first, config.steps, enabled=main)
        self.profile = profile.Profile(config, self.workdir, first, self.progress.write)
        try:
            # From here on there is something to save. Before, a signal ends the process at once.
            self.job.watch(config.training.hang_after)
            with self.on_mesh(), self.stop:
                if compiled:
                    state = self._steps(compiled, state, first)
                summary = self._end(state)
            self.checkpoints.close()
            self.metrics.close()
            self.life.note(config.steps)
            return summary
        except BaseException:
            for close in (self.profile.close, self.metrics.close, self.checkpoints.close):
                with contextlib.suppress(Exception):  # what went wrong first is what is told
                    close()
            raise
        finally:
            self.job.at(0, "idle")

    def _first_state(self) -> TrainState:
        model, optimizer, config, abstract = self.model, self.optimizer, self.config, self.abstract
        if not config.training.start:
            return init_state(model, optimizer, config, abstract)
        return state_from(start.params(config, abstract.params), model, optimizer, config, abstract)

    def _announce(self, restored: TrainState | None) -> None:
        _say(report.devices(self.mesh))
        if options := xla.compiler_options(self.mesh, self.config.training.xla):
            _say(f"xla      {xla.described(options)}")
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

    def _compiled(self) -> Callable:
        start = time.monotonic()
        compiled = xla.compile_step(self.lowered, self.config.training.xla)
        if self.debug != "nojit":
            _say(f"compiled in {time.monotonic() - start:.1f} s")
        return compiled

    def _steps(self, compiled: Callable, state: TrainState, first: int) -> TrainState:
        config = self.config
        self.read_at = time.monotonic()
        pending = None  # metrics of the step before, not read until the next step is on its way
        rows = sharding.local_rows(self.mesh, config.batch_size)
        with self.progress, data.prefetch(self.dataset, first, rows) as batches:
            for step in range(first + 1, config.steps + 1):
                self.profile.before(step, state)
                self.job.at(step, "data")
                batch = sharding.put_batch(next(batches), self.mesh, rows, config.batch_size)
                self.job.at(step, "step")
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = self.recheck.step(compiled, state, batch, step)
                self._read(pending, state)
                pending = step, metrics
                stopping = self.stop.asked()
                validating = config.evaluation.every and step % config.evaluation.every == 0
                if stopping or validating or checkpoint.due(config.checkpoint, step, config.steps):
                    self._read(pending, state)
                    pending = None
                    # Validation comes before the checkpoint, so that a run killed in between does both again.
                    self.job.at(step, "validation")
                    figures = self._validate(state, step) if validating else None
                    self.job.at(step, "checkpoint")
                    if stopping or checkpoint.due(config.checkpoint, step, config.steps):
                        self._save(step, state, figures)
                    self.read_at = time.monotonic()
                if stopping:
                    self.profile.close(state)
                    self._exit(step)
            self.profile.close(state)
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
        self._warn(step, values)
        if bad and config.training.nan == "stop":
            self._stop_at(step, f"{bad[0]} is {values[bad[0]]} at step {step}", state)
        if bad:
            self.progress.write(f"step {step}: {bad[0]} is {values[bad[0]]}, update skipped")

    def _warn(self, step: int, values: dict[str, float]) -> None:
        """A line for each figure by which a branch says that something is wrong, once for each layer."""
        for name, value in values.items():
            figure, _, layer = name.partition("/")
            if value > 0.999 and figure in self.warnings and name not in self.warned:
                self.warned.add(name)
                self.progress.write(f"step {step}: warning: layer {layer}: {self.warnings[figure]}")

    def _stop_at(self, step: int, message: str, state: TrainState) -> None:
        """Keeps the last good state, and raises UserError: which state that is, and what to do."""
        good = int(state.step)
        broken = not_finite(state)
        if self.debug == "nans":
            self._keep(good, state, broken)
            batch = self.dataset.batch(good)
            raise UserError(f"{message}; {debug.first_not_finite(self.model, self.config, state, batch)}")
        find = "find the layer with --config.training.debug=nans"
        if good == 0:
            raise UserError(f"{message}, which the initial parameters gave, so that nothing is saved; {find}")
        if broken:
            raise UserError(f"{message}: {self._broken(broken, good)}")
        self._keep(good, state, broken)
        raise UserError(
            f"{message}; the last good state is that of step {good}, saved in {self.checkpoints.directory}. {LOWER}, "
            f"go on with --config.training.nan=skip, or {find}"
        )

    def _keep(self, step: int, state: TrainState, broken: str) -> None:
        if step and not broken:
            self._save(step, state.replace(skipped=state.skipped * 0))
            self.checkpoints.close()

    def _save(self, step: int, state: TrainState, figures: dict[str, float] | None = None) -> None:
        """Saves a checkpoint behind the rows that belong to it. Raises UserError where the state is not finite."""
        if broken := not_finite(state):
            raise UserError(self._broken(broken, step))
        self.metrics.sync()
        self.checkpoints.save(step, state, figures)
        self.life.note(step)
        if self.saved:
            self.saved()  # the checkpoint before, as this one is being written

    def _broken(self, broken: str, step: int) -> str:
        self.checkpoints.close()
        newest = next(iter(checkpoint.steps(self.checkpoints.directory)), None)
        kept = "there is no checkpoint" if newest is None else f"the newest checkpoint is that of step {newest}"
        return f"{broken} {NOT_FINITE} after step {step}, though its loss was; {kept}. {LOWER}"

    def _validate(self, state: TrainState, step: int) -> dict[str, float]:
        params = state.params if state.ema is None else state.ema
        figures = self.finish.figures(params, "validation", self.config.evaluation.rows)
        row = {f"validation_{name}": value for name, value in figures.items()}
        self.metrics.write(step, row)
        self.progress.write(f"step {step}: validation {report.headline(figures)}")
        return row

    def _end(self, state: TrainState) -> dict:
        """Measures and draws what is due after the last step."""
        step = int(state.step)
        self.job.at(step, "checkpoint")
        self.checkpoints.close()
        self.job.at(step, "evaluation")
        self.stop.promise = "stopping; the checkpoint of the last step is saved"
        return self.finish.run(state, self.metrics, between=lambda: self._exit_if_asked(step))

    def _exit_if_asked(self, step: int) -> None:
        self.job.at(step, "evaluation")
        if self.stop.asked():
            self._exit(step)

    def _exit(self, step: int) -> None:
        self.checkpoints.close()
        self.life.note(step)
        _say_anyway(f"stopped after step {step}; the same command goes on from there")
        raise Preempted(step)


def _source_name(config: ConfigDict) -> str:
    """What `config.data` names: a mixture, files or a data set."""
    fields = (config.data.get(name, "") for name in ("mixture", "path"))
    return next(filter(None, fields), config.data.name)


def _load(config: ConfigDict) -> data.BatchSource:
    """The dataset that a config names. The first process builds what is missing, such as a token cache, for all."""
    here = job.current()
    if config.data.get("cache"):
        here.check_shared("config.data.cache", Path(config.data.cache).expanduser())
    sizes = dict(seq_len=config.seq_len, batch_size=config.batch_size)
    options: dict[str, Any] = dict(sizes, seed=config.seed, bptt=config.training.bptt)
    return here.first("loading the data", lambda: data.load(config.data, **options))


def _check_objective(config: ConfigDict, dataset: data.BatchSource) -> None:
    """Raises UserError where the dataset's batches are not those of the config."""
    check_spec(dataset.spec, config.batch_size, config.seq_len)
    if config.training.bptt and dataset.objective != "next_token":
        raise UserError(
            f"config.training.bptt=True: must be False with config.model.head={dataset.objective!r}, whose rows do not "
            "go on"
        )


def _say(text: str) -> None:
    if job.current().main:
        print(text, flush=True)


def _say_anyway(text: str) -> None:
    """As `_say`, to whoever still reads it: a training goes on without."""
    with contextlib.suppress(OSError):
        _say(text)
