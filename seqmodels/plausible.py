"""Configs that can be computed, but that nobody means: a new run is refused, one that was begun goes on with a warning.

The rules look at several fields together. Those without which nothing can be computed are in `seqmodels/config.py`.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from seqmodels import pattern
from seqmodels.errors import UserError
from seqmodels.fields import refuse
from seqmodels.fields.field import shown
from seqmodels.globs import matching
from seqmodels.schedule import rate, warmup_steps

ENOUGH = 0.9  # of the peak learning rate, that a run should reach


def check(config: ConfigDict) -> None:
    """Applies every rule to a config in which each field by itself is allowed. Raises UserError."""
    for rule in RULES:
        rule(config)


def doubts(config: ConfigDict, begun: bool = False) -> list[str]:
    """A line for everything in an allowed config that is hardly meant, to be shown when a run starts.

    Args:
        begun: the run was begun, perhaps under an earlier version; then the rules of `check` are among the doubts.
    """
    found = _learning_rate(config)
    if config.model.dtype == "float16":
        found.append(
            "config.model.dtype='float16': nothing scales the loss, so small gradients become 0; use 'bfloat16'"
        )
    for rule in RULES if begun else ():
        try:
            rule(config)
        except UserError as error:
            found.append(str(error))
    return [f"warning: {line}" for line in found]


def _learning_rate(config: ConfigDict) -> list[str]:
    """What is wrong with the schedule; presets are tried with few steps, so it is no reason to refuse a config."""
    optimizer, steps = config.optimizer, config.steps
    warmup, peak = warmup_steps(optimizer.warmup, steps), optimizer.learning_rate
    times = np.unique([*np.linspace(0, steps - 1, 1001).round(), min(max(warmup - 1, 0), steps - 1)])
    largest = rate(optimizer, steps, times).max()
    fields = f"config.optimizer.warmup={optimizer.warmup}"
    fields += f" and decay={optimizer.decay}" if optimizer.schedule == "wsd" else ""
    if largest < ENOUGH * peak:
        name = f"optimizer.learning_rate={peak}"
        return [f"{fields} of steps={steps}: the learning rate rises to {100 * largest / peak:.0f} % of {name} at most"]
    if warmup >= steps > 1:
        return [f"{fields}: is all of steps={steps}, so the learning rate never falls"]
    return []


def _warmup(config: ConfigDict) -> None:
    """One step, or all steps: the number 1 does not say which."""
    if (warmup := config.optimizer.warmup) == 1:
        refuse("optimizer.warmup", warmup, "below 1 (a share of the steps) or above 1 (a number of steps)")


def _seed(config: ConfigDict) -> None:
    if config.seed < 0:  # not every generator takes one
        refuse("seed", config.seed, "at least 0")


def _profile(config: ConfigDict) -> None:
    start = config.training.profile_start
    if start > config.steps:
        refuse("training.profile_start", start, f"at most steps={config.steps}; 0 for no profile")


def _best(config: ConfigDict) -> None:
    every = config.evaluation.every
    if config.checkpoint.best and every > config.steps:
        refuse("evaluation.every", every, f"at most steps={config.steps} with checkpoint.best, which is never measured")


def _files(config: ConfigDict) -> None:
    """Files that only evaluators read."""
    files, folder = config.evaluation.classification, config.evaluation.task_folder
    if files and not matching(files):
        raise UserError(f"config.evaluation.classification={shown(files)}: matches no file")
    if folder and not os.path.isdir(Path(folder).expanduser()):  # False too for a name that is too long
        raise UserError(f"config.evaluation.task_folder={shown(folder)}: is no folder")


def _step_sizes(config: ConfigDict) -> None:
    """The floor of a fresh model's step sizes leaves some of them as they are drawn."""
    for name in pattern.names(config.model.pattern):
        options = config.model.get(name, {})
        if "dt_floor" in options and options.dt_floor > options.dt_max:
            refuse(f"model.{name}.dt_floor", options.dt_floor, f"at most dt_max={options.dt_max}")


def _links(config: ConfigDict) -> None:
    """A model with dense links has at least one."""
    dense = config.model.dense
    if dense.variant == "none":
        return
    from seqmodels.backbone import plan  # imports JAX

    if any(block.sources for block in plan(config.model)):
        return
    if dense.every > 1:
        refuse("model.dense.every", dense.every, "less than the number of blocks with a state, or no block has a link")
    refuse("model.dense.variant", dense.variant, "'none' where only one block has a state, as none is below it")


RULES: tuple[Callable[[ConfigDict], None], ...] = (_warmup, _seed, _profile, _best, _files, _step_sizes, _links)
