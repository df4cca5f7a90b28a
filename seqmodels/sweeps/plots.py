"""Pictures of a sweep. A group has the same colour and number in every picture and table."""

import io
from collections.abc import Sequence

from seqmodels.sweeps.results import Group, mean_and_spread

AGAINST = {  # figure: title of its axis
    "parameters": "parameters",
    "state_bytes_per_sequence": "bytes of state a sequence",
    "tokens_per_second": "training tokens a second",
}


def losses(groups: list[Group]) -> bytes | None:
    """Training loss by step and by time, mean and spread over seeds, as a PNG; None without a loss."""
    groups = [group for group in groups if any(result.losses for result in group.results)]
    if not groups:
        return None
    figure, (by_step, by_time) = _figure(1, 2, (13, 4.5))
    longest = []
    for group in groups:
        colour = _colour(group)
        curves = [result for result in group.results if result.losses]
        steps, mean, spread = _over_seeds(curves)
        by_step.plot(steps, mean, color=colour, linewidth=1.3, label=_name(group))
        if spread is not None:
            by_step.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
        for result in curves:
            if result.seconds:  # else it shared its device
                by_time.plot(result.seconds, result.losses, color=colour, linewidth=0.9, alpha=0.8)
            longest.append(result)
    _limit(by_step, longest)
    _limit(by_time, longest)
    by_step.set(xlabel="step", ylabel="training loss, nats a token", title="by step, mean and spread over seeds")
    by_time.set(xlabel="seconds in training steps", title="by time, every seed")
    figure.legend(loc="outside right upper", fontsize="small")
    return _png(figure)


def bars(groups: list[Group], metric: str) -> bytes | None:
    """The metric of each group with its spread, and its difference from the first, as a PNG; None without values."""
    groups = [group for group in groups if group.values(metric)]
    if not groups:
        return None
    figure, (absolute, relative) = _figure(1, 2, (13, 1.6 + 0.4 * len(groups)))
    names = [_name(group) for group in groups]
    for place, group in enumerate(groups):
        mean, spread = mean_and_spread(group.values(metric))
        absolute.errorbar(mean, place, xerr=spread, fmt="o", color=_colour(group), capsize=4)
        absolute.plot(group.values(metric), [place] * len(group.values(metric)), "|", color="0.4", markersize=9)
        mean, spread = mean_and_spread(group.differences(groups[0], metric))
        relative.barh(place, mean, xerr=spread, color=_colour(group), capsize=4, height=0.6)
    absolute.set_yticks(range(len(groups)), names)
    relative.set_yticks(range(len(groups)), [str(group.number) for group in groups])
    relative.axvline(0, color="0.2", linewidth=0.8)
    for axes in (absolute, relative):
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.locator_params(axis="x", nbins=6)
    absolute.set(xlabel=metric, title="mean, spread and every seed")
    relative.set(xlabel=f"{metric}, less that of {groups[0].number}", title="difference, seed by seed")
    return _png(figure)


def quality(groups: list[Group], metric: str) -> bytes | None:
    """The metric against parameters, state and speed, as a PNG; None without values."""
    from matplotlib.ticker import EngFormatter

    groups = [group for group in groups if group.values(metric)]
    there = [name for name in AGAINST if any(group.values(name) for group in groups)]
    if not there:
        return None
    figure, panels = _figure(1, len(there), (4.6 * len(there) + 2, 4.2))
    for axes, name in zip(panels, there, strict=True):
        for group in groups:
            if not group.values(name):
                continue
            across, width = mean_and_spread(group.values(name))
            mean, spread = mean_and_spread(group.values(metric))
            label = _name(group) if axes is panels[0] else None
            axes.errorbar(across, mean, yerr=spread, xerr=width, fmt="o", color=_colour(group), capsize=3, label=label)
            axes.annotate(
                str(group.number), (across, mean), xytext=(5, 4), textcoords="offset points", fontsize="small"
            )
        axes.set(xlabel=AGAINST[name], ylabel=metric if axes is panels[0] else "")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.locator_params(nbins=6)
        axes.margins(0.1)
    figure.legend(loc="outside right upper", fontsize="small")
    return _png(figure)


def _over_seeds(curves: Sequence):
    """The steps that all results have, and mean and standard deviation there; the latter is None for one result."""
    import numpy as np

    common = sorted(set.intersection(*(set(result.steps) for result in curves)))
    tables = [dict(zip(result.steps, result.losses, strict=True)) for result in curves]
    values = np.array([[table[step] for step in common] for table in tables])
    return common, values.mean(0), values.std(0, ddof=1) if len(curves) > 1 else None


def _limit(axes, results: Sequence) -> None:
    """Limits the axis to losses after the first fifth of the steps: the high ones before hide how runs differ."""
    late = [result.losses[len(result.losses) // 5 :] for result in results]
    low, high = min(map(min, late)), max(losses[0] for losses in late)
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)


def _figure(rows: int, columns: int, size: tuple[float, float]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)[0]
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure, panels


def _colour(group: Group) -> tuple:
    import matplotlib

    return matplotlib.colormaps["tab20"]((2 * (group.number - 1) + (group.number - 1) // 10) % 20)


def _name(group: Group) -> str:
    label = group.label if len(group.label) <= 60 else group.label[:57] + "..."
    return f"{group.number}  {label}"


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
