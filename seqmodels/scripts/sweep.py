"""Trains and evaluates every trial of a sweep, and lines up what came out.

  python sweep.py --config=configs/densemamba.py --sweep=ablation --out=sweeps/ablation --seeds=3
  python sweep.py --config=configs/mamba.py --grid optimizer.learning_rate=1e-3,3e-3 --grid model.state=16,32
  python sweep.py --compare=runs/densemamba,runs/mamba --out=sweeps/two

Sweeps are functions in the config; a grid needs none. The same command skips the trials that are done and goes on with
the interrupted; several hosts may give it at the same time. Writes results.csv, report.md, report.html and pictures.
Exit status: 0 all done, 1 a mistake in the command or a trial that failed, 75 interrupted.
"""

import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from absl import flags

from seqmodels import cli, interrupt
from seqmodels.errors import UserError
from seqmodels.fields.field import shown
from seqmodels.scripts import as_typed, command_line
from seqmodels.sweeps import definition, devices, grid, report, results, slurm
from seqmodels.sweeps.attempt import Stop
from seqmodels.sweeps.checks import check_metric
from seqmodels.sweeps.live import Live
from seqmodels.sweeps.local import Workers
from seqmodels.sweeps.trial import Trial, read_json

MOST = 10_000  # seeds, or trials at once
ENGINES = ("local", "slurm", "print", "none")


def define(flag_values: flags.FlagValues, argv: list[str]) -> None:
    values: dict[str, Any] = dict(flag_values=flag_values)
    flags.DEFINE_string("spec", cli.take_config(list(argv)), "", **values)  # of --config; no flag for users
    flags.DEFINE_string("sweep", None, "Sweep of the config, by name; ablation, or only the grids, if left out.",
                        **values)  # fmt: skip
    flags.DEFINE_multi_string("grid", [], "FIELD=VALUE,VALUE: trials with each value; several: every combination.",
                              **values)  # fmt: skip
    flags.DEFINE_string("out", None, "Directory of the sweep; sweeps/<config>-<sweep> if left out.", **values)
    flags.DEFINE_integer("seeds", 1, "Seeds of every trial: seed, seed + 1, ...", lower_bound=1, upper_bound=MOST,
                         **values)  # fmt: skip
    flags.DEFINE_list("evals", [], "Evaluators of eval.py; config.evals or the usual if left out; none: no eval.py.",
                      **values)  # fmt: skip
    flags.DEFINE_integer(
        "parallel",
        0,
        "Trials at once; as many as fit on the GPUs, or one, if left out.",
        lower_bound=0,
        upper_bound=MOST,
        **values,
    )
    flags.DEFINE_integer("per_gpu", 1, "Trials that share a GPU; then their tokens/s are not reported.",
                         lower_bound=1, upper_bound=devices.PARTS, **values)  # fmt: skip
    flags.DEFINE_integer("processes", 1, "Processes of a trial, on its host (docs/processes.md).",
                         lower_bound=1, upper_bound=devices.PARTS, **values)  # fmt: skip
    flags.DEFINE_enum("engine", "local", ENGINES, "Where trials run; none: only the report.", **values)
    flags.DEFINE_list("slurm", [], "Of submitit: timeout_min=240,slurm_partition=gpu,gpus_per_node=1.", **values)
    flags.DEFINE_bool("retry", False, "Run failed and diverged trials again.", **values)
    flags.DEFINE_string("metric", "", "Figure to compare by; validation.loss if left out.", **values)
    flags.DEFINE_list("compare", [], "Run or sweep directories to line up, beside the sweep or alone.", **values)
    if flag_values["spec"].default or not any(argument.lstrip("-").startswith("compare") for argument in argv):
        cli.define_config(flag_values, argv)


def main(flag_values: flags.FlagValues) -> int:
    others = [cli.folder_of(folder) for folder in flag_values.compare]
    compared = results.of_runs(others)  # a UserError now rather than at the end
    command = command_line()
    if flag_values.spec is None:
        if not flag_values.out:
            raise UserError("--out is missing: where to write the comparison")
        commands = [line for other in others for line in read_json(other / "sweep.json").get("commands", [])]
        _write(_of_comparison(flag_values.out), "Comparison", compared, "\n".join([*commands, command]),
               flag_values.metric)  # fmt: skip
        return 0
    config = flag_values.config
    grids = flag_values.grid
    sweep = flag_values.sweep if flag_values.sweep is not None else "" if grids else "ablation"
    name = "-".join(filter(None, [sweep, grid.name_of(grids) if grids else ""]))
    folder = cli.folder_of(flag_values.out or f"sweeps/{config.name}-{name}")
    try:
        folder.exists()
    except OSError as error:
        raise UserError(f"--out={shown(str(folder))}: is no file name ({error.strerror})") from None
    check_metric(flag_values.metric, config, ",".join(flag_values.evals), compared)
    trials = definition.define(
        flag_values.spec, config, sweep, flag_values.seeds, folder, ",".join(flag_values.evals), grids,
        processes=flag_values.processes,
    )  # fmt: skip
    if flag_values.engine == "print":
        for trial in trials:
            if trial.record()["status"] != "done":
                print(trial.line)
        return 0
    commands = definition.keep(folder, flag_values.spec, name, trials, command)
    stop, unkept = Stop(), {}
    if flag_values.engine != "none":
        signal.signal(signal.SIGHUP, stop)
        with interrupt.told(stop):
            unkept = _run(trials, folder, flag_values, stop)
    lined = results.of_trials(trials, unkept)
    title = f"{name} of {flag_values.spec}"
    _write(folder, title, lined + compared, "\n".join(commands), flag_values.metric)
    return _end(lined, stop)


def _of_comparison(out: str) -> Path:
    """Where to write a comparison. Raises: UserError where it would replace the report of a sweep."""
    folder = cli.folder_of(out)
    if (folder / "sweep.json").exists():
        raise UserError(f"--out={out}: holds the report of a sweep, which the comparison would replace; take another")
    return folder


def _run(trials: list[Trial], folder: Path, flag_values: flags.FlagValues, stop: Stop) -> dict[str, dict]:
    """Runs the trials with the engine asked for; returns the records that could not be kept on disk."""
    parallel, again = flag_values.parallel, flag_values.retry
    if flag_values.engine == "slurm":
        options = definition.options(flag_values.slurm)
        with Live(trials, parallel or len(trials)) as show:
            slurm.run(trials, folder, options, parallel=parallel, again=again, show=show, stop=stop)
        return {}
    slots = devices.slots(parallel, flag_values.config, flag_values.per_gpu)
    # All trials of one seed, then of the next: what a trial compiles is there for its other seeds, and a sweep that is
    # stopped half way has something of every trial.
    workers = Workers(sorted(trials, key=lambda trial: trial.overrides["seed"]), slots, again=again, stop=stop)
    with Live(trials, len(slots)) as show:
        workers.run(show)
    return workers.unkept


def _write(folder: Path, title: str, lined: list[results.Result], command: str, metric: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        print("\n" + report.write(folder, title, results.distinct(lined), command, metric))
    except OSError as error:
        raise UserError(f"--out={folder}: cannot write the report ({error.strerror})") from error
    print(f"\nwritten {', '.join(str(folder / name) for name in ('results.csv', 'report.md', 'report.html'))}")


def _end(lined: list[results.Result], stop: Stop) -> int:
    """Says what is not done, and returns the exit status."""
    counts = Counter(result.status for result in lined)
    print(f"{counts['done']} of {len(lined)} trials done", flush=True)
    failed = [result for result in lined if result.status in ("failed", "diverged")]
    for result in failed:
        print(f"{result.status}: {result.label}, seed {result.seed}: {result.record.get('reason', '')}; "
              f"see {result.workdir / 'trial.log'}", file=sys.stderr)  # fmt: skip
    if stop.asked.is_set():
        print("stopped; the same command goes on from there", file=sys.stderr)
        return 75
    return int(counts["done"] < len(lined))


def command() -> int:
    """Runs the command line and returns the exit status."""
    return cli.run(main, define, as_typed(__doc__))


if __name__ == "__main__":
    sys.exit(command())
