"""Pictures of a metric: of each trial, its difference from the first, and against size, state and speed."""

import textwrap
from collections.abc import Iterator
from typing import Any

from seqmodels.sweeps.curves import SEEDS
from seqmodels.sweeps.placing import beside
from seqmodels.sweeps.plots import HEIGHT, SMALL, Style, name_of, new_figure, shortened
from seqmodels.sweeps.results import Group
from seqmodels.sweeps.spread import half_interval, mean_and_spread

AGAINST = {  # figure: name of its picture, title of its axis
    "parameters": ("parameters", "parameters"),
    "state_bytes_per_sequence": ("state", "bytes of state for a sequence"),
    "tokens_per_second": ("speed", "training tokens/s"),
}
ROW, LINE = 0.24, 0.12  # inches of a trial, and of each further line of its name
LABEL = 38  # characters of a line of a trial's name
MARK = 5.0  # points of the width of a mark
LINES = f"line: 95% t-interval with {SEEDS} seeds or more"


def figures(groups: list[Group], metric: str) -> Iterator[tuple[str, str, Any]]:
    """Name, description and figure of each picture for which there are values."""
    style = Style(groups)
    groups = [group for group in groups if group.values(metric)]
    if not groups:
        return
    values = {group.number: group.values(metric) for group in groups}
    yield "metric", f"{metric} of each trial: mean and every seed; {LINES}", _rows(groups, values, metric, style)
    first = groups[0]
    paired = {
        group.number: group.differences(group.control or first, metric) for group in groups if _other(group, first)
    }
    if any(paired.values()):
        than = "the trial that it is compared with" if any(g.control for g in groups) else f"trial {first.number}"
        about = f"{metric} less that of {than}, seed by seed: mean and every seed; {LINES}"
        others = [group for group in groups if paired.get(group.number)]
        title = "its control" if any(group.control for group in groups) else str(first.number)
        figure = _rows(others, paired, f"{metric} less that of {title}", style)
        figure.axes[0].axvline(0, color="0.2", linewidth=0.8)
        yield "differences", about, figure
    for name, (picture, title) in AGAINST.items():
        there = [group for group in groups if group.values(name)]
        if there:
            yield picture, f"{metric} against {title}", _against(there, name, title, metric, style)


def _other(group: Group, first: Group) -> bool:
    """Whether the group is compared with another one."""
    return (group.control or first) is not group


def _rows(groups: list[Group], values: dict[int, list[float]], title: str, style: Style) -> Any:
    """One row for each group, with the mean of its values, each value, and the interval."""
    names = [textwrap.fill(shortened(name_of(group), 3 * LABEL), LABEL) for group in groups]
    row = ROW + LINE * max(name.count("\n") for name in names)
    figure, axes = new_figure(0.9 + row * len(names), xlabel=title)
    for place, group in enumerate(groups):
        mine, colour = values[group.number], style.colour(group)
        half = half_interval(mine) if len(mine) >= SEEDS else None
        mean = mean_and_spread(mine)[0]
        axes.errorbar(mean, place, xerr=half, fmt=style.mark(group), color=colour, capsize=3, markersize=MARK)
        axes.plot(mine, [place] * len(mine), "|", color="0.4", markersize=9)
    axes.set_yticks(range(len(groups)), names, fontsize=SMALL)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.locator_params(axis="x", nbins=4)
    return figure


def _against(groups: list[Group], name: str, title: str, metric: str, style: Style) -> Any:
    """The metric against another figure, each group with its number."""
    from matplotlib.ticker import EngFormatter

    figure, axes = new_figure(HEIGHT, xlabel=title, ylabel=metric)
    means = []
    for group in groups:
        across, mean = (mean_and_spread(group.values(each))[0] for each in (name, metric))
        halves = [half_interval(v) if len(v) >= SEEDS else None for v in (group.values(name), group.values(metric))]
        axes.errorbar(across, mean, xerr=halves[0], yerr=halves[1], fmt=style.mark(group), color=style.colour(group),
                      capsize=2, markersize=MARK, elinewidth=0.9)  # fmt: skip
        means.append((across, mean))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.locator_params(nbins=5)
    axes.margins(0.12)
    style.legend(figure, marks=True)
    _number(figure, axes, groups, means, style)
    return figure


def _number(figure: Any, axes: Any, groups: list[Group], points: list[tuple[float, float]], style: Style) -> None:
    """Writes the number of each group near its point, over no other number or mark, with a line where it is far."""
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    figure.draw_without_rendering()
    pixel = figure.dpi / 72  # of a point
    height = SMALL * 1.1 * pixel
    sizes = [(0.62 * height * len(str(group.number)), height) for group in groups]
    offsets = beside([tuple(place) for place in axes.transData.transform(points)], sizes, MARK * pixel / 2)
    for group, point, (x, y) in zip(groups, points, offsets, strict=True):
        far = max(abs(x), abs(y)) > height + MARK * pixel
        colour = style.colour(group)
        line = dict(arrowstyle="-", linewidth=0.5, color=colour, shrinkA=4, shrinkB=2) if far else None
        axes.annotate(
            str(group.number), point, (x / pixel, y / pixel), textcoords="offset points", ha="center", va="center",
            fontsize=SMALL, color=colour, arrowprops=line,
        )  # fmt: skip
