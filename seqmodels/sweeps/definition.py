"""Makes trials of `sweep(add, arg)` in a config and of grids, and finds every mistake in it before anything starts."""

import copy
import dataclasses
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from seqmodels import cli, plausible
from seqmodels.atomic import replace_file
from seqmodels.claim import waited
from seqmodels.config import declared_fields, upgrade, validate, with_pattern
from seqmodels.errors import UserError
from seqmodels.fields.field import shown
from seqmodels.fields.run import ROOT
from seqmodels.nearest import nearest
from seqmodels.scripts import CHECKOUT
from seqmodels.sweeps import grid
from seqmodels.sweeps.checks import check_evaluators
from seqmodels.sweeps.trial import Trial, read_json

SCRIPTS = CHECKOUT  # the folder with train.py and eval.py; None: the installed package runs its own


def define(
    spec: str, config: ConfigDict, name: str, seeds: int, folder: Path, evals: str = "", grids: Sequence[str] = (),
    processes: int = 1,
) -> list[Trial]:  # fmt: skip
    """The trials of a sweep in its order. Equal configs count once; the seeds of a trial follow one another.

    Args:
      spec: `path/to/config.py[:preset]`.
      config: the config of `spec` with the overrides of the command.
      name: of a sweep of the config. "": only the grids.
      seeds: how many; seed, seed + 1, ...
      folder: of the sweep; run directories are `folder/trials/<id>`.
      evals: names of evaluators, separated by commas. "": those of each config. "none": no evaluation after training.
      grids: "FIELD=VALUE,VALUE" each (`seqmodels.sweeps.grid`). Each trial of the sweep is run with every combination.
      processes: that train a trial, on one host.

    What is hardly meant (`seqmodels.plausible`) is said in a line on stderr.

    Raises: UserError for a sweep, field or value that is not there.
    """
    begun = (folder / "sweep.json").exists()
    validate(config, begun)
    combined = grid.combinations(grids)
    where = f"--sweep={name}" if name else "--grid"
    listed = [
        (_gridded(trial, combination, config), None if against is None else _gridded(against, combination, config))
        for trial, against in (_listed(spec, config, name) if name else [({}, None)])
        for combination in combined
    ]
    for overrides, _ in listed:
        ROOT.fields["seed"].check("seed", overrides.get("seed", config.seed))
    written = cli.written_config(spec)
    trials: dict[str, Trial] = {}
    doubts: dict[str, None] = {}
    for overrides, other in listed:
        first = overrides.get("seed", config.seed)
        for seed in range(first, first + seeds):
            trial = _trial(spec, config, where, overrides | {"seed": seed}, written, folder, evals, begun, doubts)
            if processes > 1:
                python, *script = trial.commands["train"]
                job = (python, "-m", "seqmodels.launch", str(processes), *script)
                trial = dataclasses.replace(trial, commands=trial.commands | {"train": job})
            if other is not None:
                control = resolve(config, other | {"seed": seed}, where, begun)
                trial = dataclasses.replace(trial, against=identify(control, written))
            trials.setdefault(trial.id, trial)
    for trial in trials.values():
        if trial.against and trial.against not in trials:
            raise UserError(f"{where}: compares {shown(trial.overrides)} with a trial that the sweep does not have")
    for line in doubts:
        print(line, file=sys.stderr, flush=True)
    return list(trials.values())


def keep(folder: Path, spec: str, name: str, trials: list[Trial], command: str = "") -> list[str]:
    """Writes `sweep.json`, which says which sweep the directory belongs to.

    Returns: the commands that were run in the directory so far.

    Raises: UserError where it is another sweep's.
    """
    before = read_json(folder / "sweep.json")
    if not before and (folder / "sweep.json").exists():
        print(f"{folder / 'sweep.json'} is damaged; it is made anew, without the commands before", file=sys.stderr)
    known = {"config": spec, "sweep": name} | before
    if (known["config"], known["sweep"]) != (spec, name):
        raise UserError(
            f"--out={folder}: holds sweep {known['sweep']} of {known['config']}, not {name} of {spec}; take another"
        )
    commands = list(dict.fromkeys([*before.get("commands", []), *([command] if command else [])]))
    about: dict[str, Any] = {
        "config": spec,
        "sweep": name,
        "trials": [trial.id for trial in trials],
        "commands": commands,
    }
    if against := {trial.id: trial.against for trial in trials if trial.against}:
        about["against"] = against
    try:
        (folder / "trials").mkdir(parents=True, exist_ok=True)
        with waited(folder / "sweep.lock"):
            replace_file(folder / "sweep.json", json.dumps(about, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out={folder}: cannot be written ({error.strerror})") from error
    return commands


def options(texts: list[str]) -> dict[str, object]:
    """{"timeout_min": 60} of ["timeout_min=60"]. Raises: UserError for one that is not NAME=VALUE."""
    pairs = [text.partition("=") for text in texts]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise UserError(f"--slurm={name}{equals}{value}: must be NAME=VALUE, apart by commas")
    return {name: int(value) if value.isdecimal() else value for name, _, value in pairs}


def _gridded(fields: dict, combination: dict[str, str], config: ConfigDict) -> dict:
    """A trial of the sweep with the values of the grids."""
    return fields | grid.overrides(combination, config, fields)


def _listed(spec: str, config: ConfigDict, name: str) -> list[tuple[dict, dict | None]]:
    """What a sweep of the config adds: each trial, and what it is compared with, if it names that.

    Raises: UserError where that is nothing, or no dict of fields.
    """
    listed: list[tuple[dict, dict | None]] = []
    sweep = _find(spec, config, name)

    def add(trial: dict, against: dict | None = None) -> None:
        listed.append((trial, against))

    try:
        sweep(add, cli.split_spec(spec)[1] or None)
    except Exception as error:  # the file is a program of the user's
        raise cli.mistake(spec, cli.find_config(spec), error) from error
    if not listed:
        raise UserError(f"--sweep={name}: adds no trial")
    for overrides in itertools.chain.from_iterable(listed):
        if overrides is None:
            continue
        if not isinstance(overrides, dict) or not all(isinstance(field, str) for field in overrides):
            raise UserError(f"--sweep={name}: adds {shown(overrides)}: must be a dict of dotted fields and values")
    return listed


def _find(spec: str, config: ConfigDict, name: str) -> Callable:
    module = cli.load_module(spec)
    sweeps = ({"ablation": module.sweep} if hasattr(module, "sweep") else {}) | getattr(module, "SWEEPS", {})
    if not sweeps:
        raise UserError(f"--config={spec}: defines no sweep(add, arg); --grid=FIELD=VALUE,VALUE needs none")
    if name not in sweeps:
        raise UserError(f"--sweep={name}: no such sweep in {spec}{nearest(name, list(sweeps))}")
    # A sweep may ask get_config for what it starts from, such as a width to match. It gets the overridden config.
    vars(module)["get_config"] = lambda arg=None: copy.deepcopy(config)
    return sweeps[name]


def _trial(spec, config, where, overrides, written, folder, evals, begun, doubts) -> Trial:
    resolved = resolve(config, overrides, where, begun)
    doubts |= dict.fromkeys(plausible.doubts(resolved, begun))
    fields = dict(cli.fields(resolved))
    identity = identify(resolved, written)
    # what the command would have without flags but for the pattern, which may bring in branches
    default = dict(cli.fields(with_pattern(written, resolved.model.pattern)))
    default["model.pattern"] = upgrade(written).model.pattern
    field, evals = ("--evals", evals) if evals else ("config.evals", str(fields["evals"]))
    if evals and evals != "none":
        check_evaluators(resolved, evals.split(","), field)
    workdir = folder / "trials" / identity
    given = fields | {"evals": ""}  # eval.py's work, not train.py's as well
    flags = [f"--config.{field}={value}" for field, value in given.items() if value != default[field]]
    commands = {"train": ("python", *_script("train"), f"--config={spec}", *flags, f"--workdir={workdir}")}
    if evals != "none":
        named = [f"--evals={evals}"] if evals else []
        platform = [f"--platform={config.platform}"] if config.platform else []
        commands["eval"] = ("python", *_script("eval"), f"--workdir={workdir}", *named, *platform)
    return Trial(identity, workdir, overrides, _plain(fields), commands, evals)


def identify(resolved: ConfigDict, written: ConfigDict) -> str:
    """The name of a trial: a hash of its fields.

    It stays the same when a later version adds fields to all configs: a field at its default does not count if it came
    with a later version, or if the config file does not set it.

    Args:
      resolved: the trial's config.
      written: what the config file says, before missing fields are filled in.
    """
    declared, own = declared_fields(resolved), {name for name, _ in cli.fields(written)}

    def counts(name: str, value: object) -> bool:
        field = declared.get(name)
        return field is None or value != field.default or (field.since == 1 and name in own)

    fields = {name: value for name, value in cli.fields(resolved) if counts(name, value)}
    return hashlib.sha256(json.dumps(_plain(fields), sort_keys=True).encode()).hexdigest()[:10]


def resolve(config: ConfigDict, overrides: dict[str, object], where: str, begun: bool = False) -> ConfigDict:
    """`config` with a trial's fields set. Raises: UserError for one that is not there, or a value that does not fit.

    Args:
      where: the flag that the fields come from, for messages.
      begun: as in `seqmodels.config.validate`.
    """
    resolved = copy.deepcopy(config)
    if isinstance(pattern := overrides.get("model.pattern"), str):
        try:
            resolved = with_pattern(resolved, pattern).lock()
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    names = [field for field, _ in cli.fields(resolved)]
    for field, value in overrides.items():
        if field not in names:
            raise UserError(f"{where}: {field}={value!r}: no such field{nearest(field, names)}")
        try:
            resolved.update_from_flattened_dict({field: value})
        except TypeError:
            raise UserError(f"{where}: {field}={value!r}: must be {_kind(resolved, field)}") from None
    try:
        validate(resolved, begun)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return resolved


def _kind(config: ConfigDict, field: str) -> str:
    return f"of type {type(dict(cli.fields(config))[field]).__name__}"


def _plain(fields: dict[str, object]) -> dict[str, object]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _script(name: str) -> tuple[str, ...]:
    """Arguments of `python` that run train or eval: the file in a checkout, else the installed module."""
    if SCRIPTS is None:
        return "-m", f"seqmodels.scripts.{name}"
    file = SCRIPTS / f"{name}.py"
    path = os.path.relpath(file)
    return (str(file) if path.startswith("..") else path,)
