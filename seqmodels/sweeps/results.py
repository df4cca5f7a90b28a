"""The results of trials and other run directories: figures by name, and their mean and spread over seeds."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from seqmodels.atomic import replace_file
from seqmodels.config import upgrade
from seqmodels.errors import UserError
from seqmodels.sweeps.attempt import last_row
from seqmodels.sweeps.labels import PLAIN, RATE, labels
from seqmodels.sweeps.trial import Trial, read_json
from seqmodels.training import metrics

Grouped = TypeVar("Grouped")
WINDOW = 50  # rows of training loss in a mean, or a twentieth of them if that is fewer
UNCOUNTED = ("name", "checkpoint", "metrics", "sample")  # parts of a config that change no figure
EQUAL_TIME = "train_loss_at_equal_time"
MEASURED = "eval.training.tokens_per_second"  # of a device alone, by eval.py --evals=training_speed


@dataclasses.dataclass(eq=False)
class Result:
    """A trial or a run directory, as it is now.

    Attributes:
      label: shared by the seeds of a trial, and by nothing else (`distinct`).
      kind: what the seeds of a trial have in common, as a text: the config without the seed, and the data.
      home: for a result of `of_runs` the run's or sweep's directory, whose name begins the label.
      model, rate: the label without the learning rate, and the rate, where the sweep sets it; else the label, and None.
      columns: fields that the sweep sets, with the values that they have in this trial.
      figures: metrics by dotted name. Those of eval.json begin with "eval.".
      steps, seconds, losses: the training loss, each value the mean of a few rows, and the training time up to there.
        If the trial shared its device, `seconds` is empty, or the time that it would have taken alone.
      tokens: tokens of one step.
      against: id of the result that this one is compared with. "": the first of the report.
    """

    id: str
    workdir: Path
    label: str
    seed: int
    record: dict
    columns: dict[str, object] = dataclasses.field(default_factory=dict)
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    steps: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    kind: str = ""
    home: Path | None = None
    model: str = ""
    rate: float | None = None
    against: str = ""

    @property
    def status(self) -> str:
        return self.record["status"]


@dataclasses.dataclass(eq=False)
class Group:
    """The seeds of one trial. `number` names it in tables and plots. For `model` and `rate` see `Result`.

    Attributes:
      control: what it is compared with. None: the first group of the report.
    """

    number: int
    label: str
    results: list[Result]
    control: "Group | None" = None

    @property
    def model(self) -> str:
        return self.results[0].model or self.label

    @property
    def rate(self) -> float | None:
        return self.results[0].rate

    def values(self, metric: str) -> list[float]:
        """The values of a metric, of the seeds that have it."""
        return [result.figures[metric] for result in self.results if metric in result.figures]

    def differences(self, other: "Group", metric: str) -> list[float]:
        """The metric of this group minus that of the other group, seed by seed."""
        theirs = {result.seed: result.figures.get(metric) for result in other.results}
        pairs = [(result.figures.get(metric), theirs.get(result.seed)) for result in self.results]
        return [mine - its for mine, its in pairs if mine is not None and its is not None]


def of_trials(trials: list[Trial], unkept: dict[str, dict]) -> list[Result]:
    """A result for each trial, in the same order. unkept: records that could not be written to disk."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.overrides if name != "seed"))
    results = []
    overrides = [trial.overrides for trial in trials]
    models = _models(overrides, labels(overrides))
    for trial, label, model in zip(trials, labels(overrides), models, strict=True):
        columns = {name: trial.fields[name] for name in names if name in trial.fields}
        record = unkept.get(trial.id) or trial.record()
        result = _read(Result(trial.id, trial.workdir, label, trial.overrides["seed"], record, columns))
        result.kind = _text({name: value for name, value in trial.fields.items() if name != "seed"})
        result.model, result.rate, result.against = model, columns.get(RATE), trial.against
        results.append(result)
    return _timed(results)


def _models(overrides: list[dict[str, Any]], whole: list[str]) -> list[str]:
    """The labels of trials without their learning rates, where these are among what is set; else `whole`, theirs."""
    if not any(RATE in trial for trial in overrides):
        return whole
    return labels([{name: value for name, value in trial.items() if name != RATE} for trial in overrides])


def of_runs(folders: list[Path]) -> list[Result]:
    """A result for each run directory; for the directory of a sweep, the results of its trials.

    Raises: UserError for a folder that is neither.
    """
    results = []
    for folder in folders:
        name = folder.absolute().name
        if (folder / "sweep.json").exists():
            sweep = read_json(folder / "sweep.json")
            if not _are_strings(sweep.get("trials")):
                raise UserError(
                    f"--compare={folder}: {folder / 'sweep.json'} is damaged; give the sweep's command again"
                )
            runs = [folder / "trials" / identity for identity in sweep["trials"]]
            overrides = [read_json(run / "trial.json").get("overrides", {}) for run in runs]
            against = sweep.get("against")
            against = against if isinstance(against, dict) else {}
            there = []
            models = _models(overrides, labels(overrides))
            for run, label, model, values in zip(runs, labels(overrides), models, overrides, strict=True):
                if (run / "config.json").exists():
                    there.append(_run(run, f"{name}: {label}", folder.resolve()))
                    there[-1].against = str(against.get(run.name, ""))
                    if model != label:
                        there[-1].model = name if model == PLAIN else f"{name}: {model}"
                        there[-1].rate = values.get(RATE)
                    values = {field: value for field, value in values.items() if field != "seed"}
                    there[-1].kind += _text([str(folder.resolve()), values])
            results += _timed(there)
        elif (folder / "config.json").exists():
            results.append(_run(folder, name, folder.resolve()))
        else:
            raise UserError(
                f"--compare={folder}: neither a run directory nor a sweep's (no config.json, no sweep.json)"
            )
    return results


def _are_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _run(folder: Path, label: str, home: Path) -> Result:
    config = read_json(folder / "config.json")
    record = read_json(folder / "trial.json")
    summary = read_json(folder / "summary.json")
    record = {"status": summary.get("status", "done") if summary else "interrupted"} | record
    result = Result(folder.absolute().name, folder, label, config.get("seed", 0), record, home=home)
    result.kind = _kind(folder, config)
    return _read(result)


def _kind(folder: Path, config: dict) -> str:
    """The config of a run without its seed and without what changes no figure, and the fingerprints of its data."""
    with contextlib.suppress(UserError, TypeError, ValueError, AttributeError):  # else only an equal one is of its kind
        config = upgrade(config).to_dict()  # an older run lacks fields
    counted = {name: value for name, value in config.items() if name not in ("seed", *UNCOUNTED)}
    if isinstance(data := counted.get("data"), dict):
        counted["data"] = {name: value for name, value in data.items() if name != "cache"}
    return _text([counted, read_json(folder / "data.json")])


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def distinct(results: list[Result]) -> list[Result]:
    """The results, each directory once, with labels that only the seeds of one trial share.

    Two runs are seeds of one trial if labels and kinds are equal, and their seeds differ. Other runs with equal labels
    get the last parts of their paths in which they differ, such as `exp1/mamba` and `exp2/mamba`.
    """
    results = [members[0] for members in group_by(results, lambda result: result.workdir.resolve()).values()]
    seen: Counter = Counter()
    for result in results:  # a seed that is there twice is another run, not another seed
        seen[key := (result.label, result.kind, result.seed)] += 1
        result.kind += f" {seen[key]}" if seen[key] > 1 else ""
    for label, kinds in group_by(results, lambda result: result.label).items():
        by_kind = list(group_by(kinds, lambda result: result.kind).values())
        if len(by_kind) > 1:
            firsts = [members[0] for members in by_kind]
            for members, name in zip(by_kind, _names(label, firsts), strict=True):
                for result in members:
                    result.label = name
    return results


def _names(label: str, results: list[Result]) -> list[str]:
    """Another label for each of these results, whose label is the same."""
    homes = [result.home for result in results]
    if None not in homes and len(set(homes)) == len(homes):
        paths = [home.parts for home in homes if home]
        parts = next(n for n in range(1, max(map(len, paths)) + 1) if len({path[-n:] for path in paths}) == len(paths))
        return [str(Path(*path[-parts:])) + label.removeprefix(path[-1]) for path in paths]
    return [f"{label} ({result.workdir.absolute().parent.parent.name}/{result.id})" for result in results]


def _read(result: Result) -> Result:
    """Fills in what the run directory holds."""
    summary, evaluation = (read_json(result.workdir / name) for name in ("summary.json", "eval.json"))
    config = read_json(result.workdir / "config.json")
    summary |= summary.pop("splits", {})
    summary_steps = summary.pop("steps", None)  # steps_done says it, of any run
    path = result.workdir / "metrics.jsonl"
    rows = [row for row in metrics.read(path) if "loss" in row] if path.exists() else []
    finite = [row for row in rows if row["loss"] is not None]
    if finite:
        result.tokens = config.get("batch_size", 0) * config.get("seq_len", 0)
        alone = result.record.get("sharing", 1) == 1
        window = _window(rows)
        result.steps = [row["step"] for row in finite]
        losses = [row["loss"] for row in finite]
        result.losses = [statistics.fmean(losses[max(0, i + 1 - window) : i + 1]) for i in range(len(losses))]
        speeds = [row["tokens_per_second"] for row in finite if alone and row.get("tokens_per_second")]
        result.figures["steps_done"] = last_row(path)["step"]
        result.figures["train_loss"] = result.losses[-1]
        if speeds:
            times = list(itertools.accumulate(_seconds(rows, result.tokens)))
            result.seconds = [time for time, row in zip(times, rows, strict=True) if row["loss"] is not None]
            result.figures["tokens_per_second"] = statistics.median(speeds)
            result.figures["train_seconds"] = times[-1]
    if result.status == "done" and _trained_further(summary_steps, config, result.figures.get("steps_done", 0)):
        result.record = result.record | {"status": "interrupted", "reason": "is trained further than its summary"}
    result.figures |= dict(_leaves(summary, ""))
    result.figures |= dict(_leaves(evaluation, "eval."))
    if not result.seconds and (speed := result.figures.get(MEASURED)):
        result.figures["tokens_per_second"] = speed
    if result.status != "done":  # half a run's figures would look like another's
        result.figures = {"steps_done": result.figures["steps_done"]} if "steps_done" in result.figures else {}
    return result


def _trained_further(steps: object, config: dict, last: float) -> bool:
    """Whether a run has gone on, or is to go on, after its summary of so many steps was written."""
    asked = config.get("steps", 0)
    return isinstance(steps, int) and max(last, asked if isinstance(asked, int) else 0) > steps


def _timed(results: list[Result]) -> list[Result]:
    """Fills in `seconds` of trials that shared their device: the time alone, at the median speed of the group."""
    for each in group(results):
        speeds = each.values("tokens_per_second")
        for result in each.results:
            if speeds and result.status == "done" and result.steps and not result.seconds:
                result.seconds = [step * result.tokens / statistics.median(speeds) for step in result.steps]
                result.figures["train_seconds"] = result.seconds[-1]
    return results


def _window(rows: list[dict]) -> int:
    return max(1, min(WINDOW, len(rows) // 20))


def _seconds(rows: list[dict], tokens: int) -> Iterator[float]:
    """Time that the steps up to each row took, by the speed that the row reports."""
    for before, row in zip([{"step": 0}, *rows], rows, strict=False):
        speed = row.get("tokens_per_second")
        yield (row["step"] - before["step"]) * tokens / speed if speed else 0.0


def _leaves(value: object, name: str) -> Iterator[tuple[str, float]]:
    """Numbers in nested dicts, by dotted name. Lists are left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}{key}.")
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield name.removesuffix("."), value


def at_equal_time(results: list[Result]) -> float | None:
    """Adds to each finished run its training loss at the time when the first run ended; returns that time."""
    done = [result for result in results if result.status == "done" and result.seconds and result.seconds[-1]]
    if len(done) < 2:
        return None
    time = min(result.seconds[-1] for result in done)
    for result in done:
        there = max((i for i, seconds in enumerate(result.seconds) if seconds <= time), default=0)
        result.figures[EQUAL_TIME] = result.losses[there]
    return time


def group(results: list[Result]) -> list[Group]:
    """The seeds of each trial, in the order of the first result of each."""
    members = group_by(results, lambda result: (result.label, result.kind)).values()
    groups = [Group(number, seeds[0].label, seeds) for number, seeds in enumerate(members, 1)]
    holder = {(result.workdir.parent, result.id): each for each in groups for result in each.results}
    for each in groups:
        first = each.results[0]
        each.control = holder.get((first.workdir.parent, first.against))
    return groups


def group_by(results: list[Grouped], key: Callable[[Grouped], Any]) -> dict[Any, list[Grouped]]:
    """The results with equal keys, in the order of the first result of each."""
    groups: dict[Any, list[Grouped]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def write_csv(path: Path, results: list[Result]) -> None:
    """Writes a row for each result: id, status, seed, the fields that the sweep sets, all figures. Raises: OSError."""
    columns = list(dict.fromkeys(name for result in results for name in result.columns))
    figures = list(dict.fromkeys(name for result in results for name in result.figures))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["id", "status", "seed", *columns, *figures])
    for result in results:
        settings = [_cell(result.columns.get(name, "")) for name in columns]
        writer.writerow(
            [result.id, result.status, result.seed, *settings, *(result.figures.get(name, "") for name in figures)]
        )
    replace_file(path, buffer.getvalue())


def _cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value
