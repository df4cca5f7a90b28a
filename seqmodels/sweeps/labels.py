"""Short names of trials, of the fields in which they differ."""

from collections.abc import Callable, Sequence

PATTERN = "model.pattern"
RATE = "optimizer.learning_rate"
PLAIN = "as configured"  # the label of a trial that sets nothing


def labels(trials: Sequence[dict[str, object]]) -> list[str]:
    """A label such as `variant=read, gate=both` for each dict of overrides, without the seed and equal fields.

    What follows from the pattern is left out too, but for the learning rate: each pattern has its own in all trials.
    """
    names = list(dict.fromkeys(name for overrides in trials for name in overrides if name != "seed"))
    if len({_text(overrides) for overrides in trials}) > 1:
        names = [name for name in names if len({str(overrides.get(name)) for overrides in trials}) > 1]
    if PATTERN in names:
        names = [name for name in names if name in (PATTERN, RATE) or not _follows_from_pattern(name, trials)]
    last = [name.split(".")[-1] for name in names]
    short = {name: tail if last.count(tail) == 1 else name for name, tail in zip(names, last, strict=True)}

    def label(overrides: dict[str, object], value: Callable[[object], str]) -> str:
        return ", ".join(f"{short[name]}={value(overrides[name])}" for name in names if name in overrides)

    rounded = [label(overrides, _value) for overrides in trials]
    exact = [label(overrides, repr) for overrides in trials]
    if len(set(rounded)) < len(set(exact)):  # numbers that differ only further back
        rounded = exact
    return [text or PLAIN for text in rounded]


def _follows_from_pattern(name: str, trials: Sequence[dict[str, object]]) -> bool:
    pairs = {(str(overrides.get(PATTERN)), str(overrides.get(name))) for overrides in trials}
    return len(pairs) == len({pattern for pattern, _ in pairs})


def _text(overrides: dict[str, object]) -> str:
    return str(sorted((name, str(value)) for name, value in overrides.items() if name != "seed"))


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
