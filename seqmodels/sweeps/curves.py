"""Training losses of a sweep as curves: by step, by time, and less those of the first trial."""

from collections.abc import Iterator, Sequence
from typing import Any

from seqmodels.sweeps.placing import apart
from seqmodels.sweeps.plots import SMALL, Style, new_figure
from seqmodels.sweeps.results import Group, Result
from seqmodels.sweeps.spread import half_interval

SEEDS = 3  # from this number on, an interval is drawn; that of two seeds is mostly wider than the picture
BAND = f"band: 95% t-interval with {SEEDS} seeds or more"


def figures(groups: list[Group]) -> Iterator[tuple[str, str, Any]]:
    """Name, description and figure of each picture of curves for which there are losses."""
    style = Style(groups)
    groups = [group for group in groups if curves_of(group)]
    if groups:
        yield "losses", f"training loss by step, mean over seeds; {BAND}", _by_step(groups, style)
    if any(result.seconds for group in groups for result in group.results):
        yield "losses_by_time", "training loss by time, every seed", _by_time(groups, style)
    if len(groups) > 1 and (figure := _differences(groups, style)):
        about = f"training loss less that of trial {groups[0].number}, seed by seed, mean; {BAND}"
        yield "loss_differences", about, figure


def curves_of(group: Group) -> list[Result]:
    return [result for result in group.results if result.losses]


def _by_step(groups: list[Group], style: Style) -> Any:
    figure, axes = new_figure(xlabel="step", ylabel="training loss")
    drawn, ends = [], []
    for group in groups:
        steps, values = _common([_table(result) for result in curves_of(group)])
        if steps:
            ends.append(_draw(axes, steps, values, group, style))
            drawn.append(group)
    _limit(axes, [result for group in groups for result in curves_of(group)])
    style.legend(figure)
    _number_ends(figure, axes, drawn, ends, style)
    return figure


def _by_time(groups: list[Group], style: Style) -> Any:
    figure, axes = new_figure(xlabel="seconds in training steps", ylabel="training loss")
    drawn = [(group, r) for group in groups for r in curves_of(group) if r.seconds]  # without: it shared its device
    for group, result in drawn:
        axes.plot(result.seconds, result.losses, **_line(group, style), linewidth=1)
    _limit(axes, [result for _, result in drawn])
    style.legend(figure)
    return figure


def _differences(groups: list[Group], style: Style) -> Any:
    """None where no other trial has a seed of the first one."""
    figure, axes = new_figure(xlabel="step", ylabel=f"training loss less that of {groups[0].number}")
    axes.axhline(0, color="0.2", linewidth=0.8)
    first = {result.seed: _table(result) for result in curves_of(groups[0])}
    drawn, ends, late = [], [], []
    for group in groups[1:]:
        pairs = [
            (dict(zip(r.steps, r.losses, strict=True)), first[r.seed]) for r in curves_of(group) if r.seed in first
        ]
        tables = [{step: mine[step] - its[step] for step in mine.keys() & its.keys()} for mine, its in pairs]
        steps, values = _common(tables)
        if steps:
            ends.append(_draw(axes, steps, values, group, style))
            late += [value for each in values[len(values) // 5 :] for value in each]
            drawn.append(group)
    if not drawn:
        return None
    margin = 0.05 * (max(late) - min(late)) or 0.1
    axes.set_ylim(min(0, *late) - margin, max(0, *late) + margin)
    style.legend(figure)
    _number_ends(figure, axes, drawn, ends, style)
    return figure


def _draw(axes: Any, steps: list[int], values: list[list[float]], group: Group, style: Style) -> float:
    """Draws the mean over seeds and its interval; returns the last mean. values: by step, one for each seed."""
    means = [sum(each) / len(each) for each in values]
    axes.plot(steps, means, **_line(group, style), linewidth=1.5)
    if len(values[0]) >= SEEDS:
        halves = [half_interval(each) or 0.0 for each in values]
        low, high = ([mean + sign * half for mean, half in zip(means, halves, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=style.colour(group), alpha=0.15, linewidth=0)
    return means[-1]


def _line(group: Group, style: Style) -> dict[str, Any]:
    return dict(color=style.colour(group), linestyle=style.dash(group))


def _table(result: Result) -> dict[int, float]:
    return dict(zip(result.steps, result.losses, strict=True))


def _common(tables: Sequence[dict[int, float]]) -> tuple[list[int], list[list[float]]]:
    """The steps that all seeds have, and the values of all seeds at each; none without seeds."""
    steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    return steps, [[table[step] for table in tables] for step in steps]


def _limit(axes: Any, results: Sequence[Result]) -> None:
    """Limits the axis to losses after the first fifth of the steps: the high ones before hide how runs differ."""
    late = [result.losses[len(result.losses) // 5 :] for result in results]
    low, high = min(map(min, late)), max(losses[0] for losses in late)
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)


def _number_ends(figure: Any, axes: Any, groups: list[Group], ends: list[float], style: Style) -> None:
    """Writes the number of each curve beside its end, in the margin, without overlap."""
    low, high = axes.get_ylim()
    heights = [min(max((end - low) / (high - low), 0.0), 1.0) for end in ends]
    figure.draw_without_rendering()  # for the size of the axes
    line = SMALL * 1.05 * figure.dpi / 72 / axes.get_window_extent().height
    across = axes.get_yaxis_transform()  # x in the axes, y too, by `places`
    for group, height, place in zip(groups, heights, apart(heights, line, 0, 1), strict=True):
        colour = style.colour(group)
        y, target = (low + part * (high - low) for part in (height, place))
        axes.plot([1, 1.025], [y, target], color=colour, linewidth=0.7, transform=across, clip_on=False)
        axes.text(1.03, target, str(group.number), color=colour, fontsize=SMALL, va="center", transform=across)
    axes.set_ylim(low, high)
