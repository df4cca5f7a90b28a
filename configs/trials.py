"""Lists of trials for a config's `sweep(add, arg)`. A trial is a dict of dotted fields: {"model.width": 192}.

    for trial in product(vary("model.dense.depth", 1, 2, 4), vary("model.dense.gate", "channel", "both")):
        add(trial)

gives six trials. With `chain` in place of `product` it gives five. `zipped` needs lists of equal length.
"""

import itertools
from collections.abc import Sequence
from typing import Any

Trial = dict[str, Any]


def vary(field: str, *values: Any) -> list[Trial]:
    """One trial per value."""
    return [{field: value} for value in values]


def product(*lists: Sequence[Trial]) -> list[Trial]:
    """Every combination of a trial of each list, the last list fastest. Raises ValueError where two set one field."""
    return [_merged(trials) for trials in itertools.product(*lists)]


def zipped(*lists: Sequence[Trial]) -> list[Trial]:
    """The lists side by side: first with first, second with second. Raises ValueError where their lengths differ."""
    return [_merged(trials) for trials in zip(*lists, strict=True)]


def chain(*lists: Sequence[Trial]) -> list[Trial]:
    """The lists one after another."""
    return list(itertools.chain(*lists))


def _merged(trials: Sequence[Trial]) -> Trial:
    merged: Trial = {}
    for trial in trials:
        if twice := merged.keys() & trial.keys():
            raise ValueError(f"two lists of trials set {', '.join(sorted(twice))}")
        merged |= trial
    return merged
