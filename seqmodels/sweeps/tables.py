"""Tables of a sweep's report: a row for each trial."""

import math
import statistics

from seqmodels.sweeps.markup import Block, Heading, Table
from seqmodels.sweeps.results import EQUAL_TIME, Group, group_by
from seqmodels.sweeps.spread import half_interval, mean_and_spread

RESULTS = {  # of the first table, behind the metric: figure to its heading
    "validation.bits_per_byte": "validation bits/byte",
    "test.bits_per_byte": "test bits/byte",
    "validation.accuracy": "validation accuracy",
    "test.accuracy": "test accuracy",
}
COSTS = {  # of the second table
    "train_loss": "training loss",
    EQUAL_TIME: "training loss at equal time",
    "parameters": "parameters",
    "state_bytes_per_sequence": "state bytes",
    "tokens_per_second": "tokens/s",
}
INTERVAL = "95% interval"
MORE_IS_BETTER = ("acc", "tokens_per_second", "exact_match", "f1")  # in the last part of a metric's name


def results(groups: list[Group], metric: str) -> Table:
    """The metric of each trial with its interval, its difference from the first trial, and the other results.

    Trials that name another to be compared with have the difference from that one.
    """
    figures = [name for name in RESULTS if name != metric and any(group.values(name) for group in groups)]
    headers = ["#", "trial", "seeds", metric, INTERVAL, *_compared(groups)]
    rows = []
    for each in groups:
        done = sum(result.status == "done" for result in each.results)
        seeds = f"{done}" if done == len(each.results) else f"{done} of {len(each.results)}"
        cells = [_figure(each.values(metric)), _interval(each.values(metric))]
        cells += _difference(groups, each, each.control or groups[0], metric)
        rows.append([str(each.number), each.label, seeds, *cells, *(_figure(each.values(name)) for name in figures)])
    return _without_empty(Table([*headers, *(RESULTS[name] for name in figures)], rows))


def _compared(groups: list[Group]) -> list[str]:
    """Headers of `_difference`."""
    if any(group.control for group in groups):
        return ["compared with", "difference", INTERVAL]
    return [f"difference from {groups[0].number}", INTERVAL]


def _difference(groups: list[Group], mine: Group, control: Group, metric: str) -> list[str]:
    """Cells: the control's number where groups differ in it, the difference seed by seed, and its interval."""
    less = [] if mine is control else mine.differences(control, metric)
    cells = ["" if mine is control else _figure(less, sign="+"), _interval(less)]
    number = "" if mine is control else str(control.number)
    return [*([number] if any(group.control for group in groups) else []), *cells]


def costs(groups: list[Group], metric: str) -> Table:
    """What each trial took; no rows where there are no such figures."""
    figures = [name for name in COSTS if name != metric and any(group.values(name) for group in groups)]
    rows = [[str(each.number), each.label, *(_figure(each.values(name)) for name in figures)] for each in groups]
    return Table(["#", "trial", *(COSTS[name] for name in figures)], rows if figures else [])


def best_rates(groups: list[Group], metric: str) -> list[Block]:
    """A table with the best learning rate of each model, where the sweep has models at several rates."""
    models = group_by([group for group in groups if group.values(metric)], lambda group: group.model)
    if not any(len({group.rate for group in members}) > 1 for members in models.values()):
        return []
    choose = max if any(word in metric.split(".")[-1] for word in MORE_IS_BETTER) else min
    figures = [name for name in RESULTS if name != metric and any(group.values(name) for group in groups)]
    bests = {
        model: choose(members, key=lambda group: statistics.fmean(group.values(metric)))
        for model, members in models.items()
    }
    first, rows = next(iter(bests.values())), []
    for model, members in models.items():
        best = bests[model]
        rates = sorted({group.rate for group in members if group.rate is not None})
        edge = {0: ", the lowest", len(rates) - 1: ", the highest"} if len(rates) > 1 else {}
        rate = "" if best.rate is None else f"{best.rate:.4g}{edge.get(rates.index(best.rate), '')}"
        cells = [_figure(best.values(metric)), _interval(best.values(metric))]
        control = bests.get(best.control.model, best.control) if best.control else first
        cells += _difference(groups, best, control, metric)
        cells += [_figure(best.values(name)) for name in figures]
        rows.append([str(best.number), model, rate, f"{len(rates)}", f"{len(best.values(metric))}", *cells])
    difference = _compared([first, *groups])  # of best rates, so the first is another than that of all trials
    headers = ["#", "model", "learning rate", "of rates", "seeds", metric, INTERVAL, *difference]
    headers += [RESULTS[name] for name in figures]
    note = f"The rate is the one with the best mean {metric}. A rate at the edge of those tried may not be the best."
    return [Heading("Best learning rate of each model"), _without_empty(Table(headers, rows)), note]


def _without_empty(table: Table) -> Table:
    """The table without columns in which no row has anything."""
    kept = [i for i in range(len(table.headers)) if i < table.texts or any(row[i] for row in table.rows)]
    return Table([table.headers[i] for i in kept], [[row[i] for i in kept] for row in table.rows], table.texts)


def _interval(values: list[float]) -> str:
    """Ends of the 95% t-interval of the mean, such as `[1.4291, 1.4343]`; "" for fewer than two values."""
    half = half_interval(values)
    if half is None:
        return ""
    mean = statistics.fmean(values)
    digits = ".0f" if abs(mean) >= 1000 else ".1f" if abs(mean) >= 100 else ".4f"
    return f"[{mean - half:{digits}}, {mean + half:{digits}}]"


def _figure(values: list[float], sign: str = "") -> str:
    """A figure such as `1.4317 ± 0.0012`; counts and numbers above a thousand have no decimals."""
    mean, spread = mean_and_spread(values)
    if math.isnan(mean):
        return "–"
    whole = not spread and all(isinstance(value, int) for value in values)
    digits = ".0f" if whole or abs(mean) >= 1000 else ".1f" if abs(mean) >= 100 else ".4f"
    text = f"{mean:{sign},{digits}}"
    return text if not spread else f"{text} ± {spread:,{digits}}"


def evaluations(groups: list[Group]) -> list[Block]:
    """A table of the figures of eval.py: a row for each figure that differs, a column for each group."""
    names = dict.fromkeys(name for g in groups for r in g.results for name in r.figures if name.startswith("eval."))
    rows = []
    for name in names:
        values = [each.values(name) for each in groups]
        if len({value for seeds in values for value in seeds}) > 1:
            rows.append([name.removeprefix("eval."), *(_figure(seeds) for seeds in values)])
    if not rows:
        return []
    headers = ["eval.py", *(str(each.number) for each in groups)]
    return [Heading("Evaluations"), Table(headers, rows, texts=1)]
