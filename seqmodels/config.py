"""What a config may hold, checked before anything is compiled or a device is touched.

The fields themselves are declared in `seqmodels/fields`; here are the rules between fields of different groups.
"""

import copy
import json
import numbers
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from seqmodels import pattern, plausible
from seqmodels.branches import BRANCHES
from seqmodels.errors import UserError
from seqmodels.fields import Field, Group, group, refuse
from seqmodels.fields.depth import ATTNRES, HYPER
from seqmodels.fields.field import HUGE, LARGEST
from seqmodels.fields.model import DENSE, MODEL
from seqmodels.fields.run import groups_of
from seqmodels.kernels import OPERATIONS
from seqmodels.nearest import nearest

MOST_TOKENS = 2**28  # of a step; the host makes all of them at once
OPEN = ("data.task", "data.domain")  # whose fields are those of a class, which checks them (seqmodels/data)


def validate(config: ConfigDict, begun: bool = False) -> None:
    """Check every field that can be checked without a device, a tokenizer or data. Fields may be missing.

    Args:
        config: of a run that is to be trained.
        begun: the run or sweep was begun, perhaps under an earlier version. Then a config that can be computed is
            allowed, though it may be hardly meant (`seqmodels.plausible`).

    Raises UserError: one line with the field, its value and what is allowed.
    """
    check_names(config)
    config = upgrade(config)
    for declared in groups(config):
        declared.check_fields(part(config, declared.home))
    check_blocks(config.model)
    for name in pattern.names(config.model.pattern):
        if options := group(name):
            options.validate(config.model[name], config.model.width)
    accumulate, repeats, scan = config.training.accumulate, config.model.repeats, config.model.scan_blocks
    if config.batch_size % accumulate:
        refuse("batch_size", config.batch_size, f"a multiple of training.accumulate={accumulate}")
    if scan and repeats % scan:
        refuse("model.scan_blocks", scan, f"0, or a divisor of model.repeats={repeats}")
    if config.model.positions == "learned" and config.model.position_table < config.seq_len:
        refuse("model.position_table", config.model.position_table, f"at least seq_len={config.seq_len}")
    if config.batch_size * config.seq_len > MOST_TOKENS:
        wide = "seq_len" if config.seq_len > config.batch_size else "batch_size"
        refuse(wide, config[wide], f"smaller: a step of batch_size * seq_len has at most {MOST_TOKENS} tokens")
    if "task" in config.data:
        from seqmodels.data import synthetic

        sizes = dict(seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed)
        synthetic.load(config.data, **sizes, bptt=config.training.bptt)
    if "domain" in config.data:
        from seqmodels.data import domains

        domains.make_domain(config.data.name, dict(config.data.domain))
        if half_rate := config.data.half_rate:
            from seqmodels.model import check_time  # imports JAX

            check_time(config.model, f"config.data.half_rate={half_rate}", ("token",))
    check_implementation(config.model.implementation)
    _check_branches(config)
    _check_connections(config.model)
    _check_optimizer(config)
    if not begun:
        plausible.check(config)


def check_blocks(model: ConfigDict) -> None:
    """Raises UserError for more blocks than a model can have; `model` is config.model with all fields."""
    blocks = len(pattern.parse(model.pattern))
    if model.repeats * blocks > pattern.MOST_BLOCKS:
        allowed = f"at most {pattern.MOST_BLOCKS // blocks}, which makes {pattern.MOST_BLOCKS} blocks"
        refuse("model.repeats", model.repeats, allowed)
    if model.parallel_norms and all(len(step) == 1 for block in pattern.parse(model.pattern) for step in block):
        allowed = f"False with model.pattern={model.pattern!r}, without branches side by side"
        refuse("model.parallel_norms", True, allowed)
    for word in model.norms_behind.split():
        if word not in (known := pattern.names(model.pattern)):
            refuse("model.norms_behind", model.norms_behind, f"'' or some of {', '.join(known)}, of model.pattern")


def check_implementation(implementation: ConfigDict) -> None:
    """Raises UserError for a backend that an operation does not have; `implementation` is config.model.implementation.

    Imports JAX where a backend is named.
    """
    for operation, name in implementation.items():
        if name and name not in (there := OPERATIONS[operation].IMPLEMENTATIONS):
            refuse(f"model.implementation.{operation}", name, f"'' or one of {', '.join(map(repr, there))}")


def upgrade(stored: ConfigDict | Mapping[str, Any]) -> ConfigDict:
    """A copy of a config, unlocked, in which every declared field is there: those that were missing have the default.

    A field that came later has a default that means "as before". So the config.json of an old run, or a config file
    that somebody wrote for an earlier version, means what it meant. The options of a branch are filled in where the
    pattern names it, or some of them are there.

    Raises UserError where model.pattern is wrong.
    """
    config: ConfigDict = copy.deepcopy(stored) if type(stored) is ConfigDict else ConfigDict(_plain_dict(stored))
    config.unlock()
    model = part(config, "model")
    if isinstance(backend := model.get("implementation"), str):  # older runs have one for all operations
        del model["implementation"]
        model.implementation = ConfigDict(dict.fromkeys(("selective_scan", "short_conv", "attention"), backend))
    _fill(config)
    return config


def override(config: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
    """The config with some fields replaced, in place. `fields` has dotted names.

    Raises: UserError for a field or value that is not allowed.
    """
    declared = declared_fields(config)
    for name, value in fields.items():
        if name not in declared:
            raise UserError(f"config.{name}={value!r}: there is no such field{nearest(name, list(declared))}")
        declared[name].check(name, value)
    with config.unlocked():
        config.update_from_flattened_dict(dict(fields))
    return config


def read_stored(path: Path) -> ConfigDict:
    """The config in the config.json of a run, locked. Fields that an older run lacks get defaults.

    Raises FileNotFoundError or NotADirectoryError where there is none, UserError where it is damaged.
    """
    try:
        stored = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it from a backup") from error
    try:
        if not isinstance(stored["model"], dict):
            raise TypeError("model is no group of fields")
        return upgrade(stored).lock()
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(f"{path} is not the config of a run ({error}); restore it from a backup") from error


def complete_model(model: ConfigDict | Mapping[str, Any]) -> ConfigDict:
    """A copy of `config.model`, unlocked, with every declared field; options of branches are checked by their modules.

    Raises UserError for a field of the model itself, or of its dense links, that is not declared or not allowed.
    """
    config = ConfigDict({"model": _plain_dict(model)})
    check_names(config)
    complete = upgrade(config).model
    MODEL.check_fields(complete)
    check_blocks(complete)
    _check_connections(complete)
    return complete


def with_pattern(config: ConfigDict, text: str) -> ConfigDict:
    """An unlocked copy with another `model.pattern`, and all fields that are missing at their defaults, those of the
    pattern's branches among them. Raises UserError where the pattern is wrong."""
    config = copy.deepcopy(config).unlock()
    part(config, "model", create=True).pattern = text
    _fill(config)
    return config


def _fill(config: ConfigDict) -> None:
    """Sets the declared fields that are missing to their defaults, in place."""
    for declared in groups(config):
        options = part(config, declared.home, create=True)
        for name, field in declared.fields.items():
            if name not in options:
                options[name] = field.default
            elif (value := _stored(field, options[name])) is not options[name]:
                del options[name]  # or the type of the old value would stay
                options[name] = value


def _stored(field: Field, value: Any) -> Any:
    """A value as a config stores it: tuples for lists (of JSON), Python's numbers for NumPy's, floats for huge ones."""
    if isinstance(field.default, tuple) and isinstance(value, list):
        return tuple(value)
    if isinstance(value, numbers.Number) and hasattr(value, "item"):
        value = value.item()
    if isinstance(field.default, float) and isinstance(value, int) and LARGEST < abs(value) <= HUGE:
        return float(value)  # no program takes it as an integer
    return value


def groups(config: ConfigDict) -> tuple[Group, ...]:
    """All declared groups of a config in order, those of its branches behind the other groups of `config.model`.

    A branch is there where `config.model` has its options or the pattern names it. Raises UserError where it is wrong.
    """
    model = part(config, "model")
    named = pattern.names(model.pattern) if "pattern" in model else []
    there = [name for name, value in model.items() if isinstance(value, ConfigDict) and name in BRANCHES]
    found = (group(name) for name in dict.fromkeys([*there, *named]))
    run = groups_of(config)
    behind = run.index(DENSE) + 1
    return (*run[:behind], *(declared for declared in found if declared), *run[behind:])


def declared_fields(config: ConfigDict) -> dict[str, Field]:
    """The declaration of every field of a config by its dotted name, such as "model.mamba.state"."""
    return {declared.place(name): field for declared in groups(config) for name, field in declared.fields.items()}


def part(config: ConfigDict, home: str, create: bool = False) -> ConfigDict:
    """The group at a dotted place of a config. Where it is not there: an empty one, put there with `create`."""
    for name in home.split(".") if home else ():
        if name not in config and create:
            config[name] = ConfigDict()
        inside = config.get(name)
        config = inside if isinstance(inside, ConfigDict) else ConfigDict()
    return config


def check_names(config: ConfigDict) -> None:
    """Raises UserError for the first field or group of a config that is not declared, with the nearest name that is."""
    allowed, homes = declared_fields(config), {declared.home for declared in groups(config)}
    for name, value in _entries(config, open_groups=(*OPEN, *(f"model.{branch}" for branch in BRANCHES))):
        is_group = isinstance(value, ConfigDict)
        if name in (homes if is_group else allowed):
            continue
        if is_group and name in allowed:
            refuse(name, value.to_dict(), allowed[name].words())
        if name in homes:
            refuse(name, value, "a group of fields")
        if is_group:
            branches = [f"model.{branch}" for branch in BRANCHES]
            raise UserError(
                f"config.{name}: no such group of fields{nearest(name, [*sorted(homes - {''}), *branches])}"
            )
        raise UserError(f"config.{name}={value!r}: no such field{nearest(name, list(allowed))}")


def _entries(config: ConfigDict, open_groups: tuple[str, ...], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every field and group, but for those of branches whose options nobody declares."""
    for name, value in config.items():
        dotted = prefix + name
        if isinstance(value, ConfigDict):
            if dotted in open_groups and group(name) is None:
                continue
            yield dotted, value
            yield from _entries(value, open_groups, f"{dotted}.")
        else:
            yield dotted, value


def _check_optimizer(config: ConfigDict) -> None:
    """Check what schedule_free, whose parameters are between two others, leaves no room for."""
    optimizer = config.optimizer
    if optimizer.name != "schedule_free":
        return
    name = "optimizer.name='schedule_free'"
    if optimizer.schedule != "constant":
        refuse("optimizer.schedule", optimizer.schedule, f"'constant' with {name}")
    for field in ("ema", "groups"):
        if optimizer[field]:
            refuse(f"optimizer.{field}", optimizer[field], f"{type(optimizer[field])()!r} with {name}")
    if not optimizer.b1:
        refuse("optimizer.b1", optimizer.b1, f"greater than 0 with {name}")
    if config.training.nan == "skip":
        refuse("training.nan", "skip", f"'stop' with {name}")


def _check_connections(model: ConfigDict) -> None:
    """Check the options of connections across depth, of which a model has one."""
    for declared in (ATTNRES, HYPER, DENSE):
        declared.validate(model[declared.name], model.width)
    if model.depth != "none" and model.dense.variant != "none":
        refuse("model.depth", model.depth, f"'none' with model.dense.variant={model.dense.variant!r}")


def _plain_dict(stored: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    return stored.to_dict() if isinstance(stored, ConfigDict | FrozenConfigDict) else dict(stored)


def _check_branches(config: ConfigDict) -> None:
    """Rules between the pattern's branches and fields of other groups; only these ask for the branches' classes."""
    bptt = config.training.bptt
    if not bptt and config.model.dense.variant == "none":
        return
    from seqmodels import backbone  # imports JAX
    from seqmodels.branch import grows

    backbone.plan(config.model)
    if not bptt:
        return
    for name in pattern.names(config.model.pattern):
        branch = backbone.branch_of(config.model, name, parent=None)
        if grows(branch, config.seq_len):
            refuse("training.bptt", bptt, f"False with {name} in model.pattern, whose state grows with the context")
        if branch.redraw_every:
            place = f"model.{name}.redraw"
            refuse(place, branch.redraw_every, "0 with training.bptt, as the state is made of the features")
