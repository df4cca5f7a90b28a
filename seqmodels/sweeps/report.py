"""The report of a sweep: results.csv, report.md, report.html and pictures, each replaced in one atomic step."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from seqmodels.atomic import replace_file
from seqmodels.claim import waited
from seqmodels.errors import UserError
from seqmodels.nearest import nearest
from seqmodels.sweeps import plots
from seqmodels.sweeps.markup import Block, Code, Heading, Picture, Table, markdown, page
from seqmodels.sweeps.results import EQUAL_TIME, Group, Result, at_equal_time, group, mean_and_spread, write_csv

COLUMNS = {  # of the first table: figure to its heading; the metric stands before them
    "validation.bits_per_byte": "validation bits/byte",
    "test.bits_per_byte": "test bits/byte",
    "validation.accuracy": "validation accuracy",
    "test.accuracy": "test accuracy",
    "train_loss": "training loss",
    EQUAL_TIME: "training loss at equal time",
    "parameters": "parameters",
    "state_bytes_per_sequence": "state bytes",
    "tokens_per_second": "tokens/s",
}
QUALITY = ("validation.loss", "train_loss")  # the first that is there is the metric, if none is named
LOG_LINES = 40  # of a failed trial, in the HTML


def write(folder: Path, *arguments: Any) -> str:
    """As `compose`, but only one process of a sweep writes at a time. Arguments are those of `compose`."""
    with waited(folder / "sweep.lock"):
        return compose(folder, *arguments)


def compose(folder: Path, title: str, results: list[Result], command: str, metric: str = "") -> str:
    """Writes results.csv, report.md, report.html, losses.png, bars.png and quality.png, and returns the table.

    Args:
      command: the commands that made the results.
      metric: a figure's name, for the comparison and the plots; "" takes the first of QUALITY that is there.

    Raises: UserError for a metric that no result has; OSError where a file cannot be written.
    """
    time = at_equal_time(results)
    groups = group(results)
    write_csv(folder / "results.csv", results)
    metric = _metric(results, metric)
    first = _table(groups, metric)
    blocks: list[Block] = [first, _note(groups, metric, time)]
    for name, description, png in (
        ("losses.png", "training losses", plots.losses(groups)),
        ("bars.png", f"{metric} of each trial", plots.bars(groups, metric)),
        ("quality.png", f"{metric} against parameters, state and speed", plots.quality(groups, metric)),
    ):
        if png:
            replace_file(folder / name, png)
            blocks.append(Picture(name, description, png))
        else:
            (folder / name).unlink(missing_ok=True)
    blocks += _evaluations(groups)
    blocks += _unfinished(results)
    blocks += [Heading("How it was made"), Code(command), _provenance(results)]
    replace_file(folder / "report.md", markdown(title, _brief(blocks)))
    replace_file(folder / "report.html", page(title, blocks))
    return _plain(first)


def _metric(results: list[Result], metric: str) -> str:
    names = list(dict.fromkeys(name for result in results if result.status == "done" for name in result.figures))
    if metric and names and metric not in names:
        raise UserError(f"--metric={metric}: no such figure{nearest(metric, names)}")
    return metric or next((name for name in QUALITY if name in names), QUALITY[0])


def _table(groups: list[Group], metric: str) -> Table:
    columns = {metric: metric} | {name: heading for name, heading in COLUMNS.items() if name != metric}
    columns = {name: heading for name, heading in columns.items() if any(group.values(name) for group in groups)}
    headers = ["#", "trial", "seeds", *columns]
    rows = []
    for each in groups:
        done = sum(result.status == "done" for result in each.results)
        row = [
            str(each.number),
            each.label,
            f"{done}" if done == len(each.results) else f"{done} of {len(each.results)}",
        ]
        for name in columns:
            row.append(_figure(each.values(name)))
            if name == metric:
                row.append("" if each is groups[0] else _figure(each.differences(groups[0], metric), sign="+"))
        rows.append(row)
    headers = ["#", "trial", "seeds"]
    for name, heading in columns.items():
        headers += [heading, f"less that of {groups[0].number}"] if name == metric else [heading]
    return Table(headers, rows)


def _figure(values: list[float], sign: str = "") -> str:
    """A figure such as `1.4317 ± 0.0012`; counts and numbers above a thousand have no decimals."""
    mean, spread = mean_and_spread(values)
    if math.isnan(mean):
        return "–"
    whole = not spread and all(isinstance(value, int) for value in values)
    digits = ".0f" if whole or abs(mean) >= 1000 else ".1f" if abs(mean) >= 100 else ".4f"
    text = f"{mean:{sign},{digits}}"
    return text if not spread else f"{text} ± {spread:,{digits}}"


def _note(groups: list[Group], metric: str, time: float | None) -> str:
    parts = [
        f"± is the sample standard deviation over seeds. {metric} less that of {groups[0].number} is the mean over "
        "seeds that both have, of the differences seed by seed."
    ]
    if time is not None:
        parts.append(f"Equal time is {time:,.1f} s in training steps, when the first run ended.")
    return " ".join(parts)


def _evaluations(groups: list[Group]) -> list[Block]:
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


def _unfinished(results: list[Result]) -> list[Block]:
    blocks: list[Block] = []
    left = [result for result in results if result.status != "done"]
    if left:
        rows = [[r.id, r.label, str(r.seed), r.status, r.record.get("reason", "")] for r in left]
        blocks += [Heading("Not done"), Table(["id", "trial", "seed", "status", "reason"], rows, texts=5)]
    for result in left:
        log = result.workdir / "trial.log"
        if result.status in ("failed", "diverged") and log.exists():
            lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            blocks.append(Code("\n".join(lines), f"End of {log}"))
    return blocks


def _brief(blocks: list[Block]) -> list[Block]:
    """Without the logs."""
    return [block for block in blocks if not (isinstance(block, Code) and block.heading)]


def _provenance(results: list[Result]) -> str:
    """Commit, device, dates and seeds of the trials."""
    records = [result.record for result in results]

    def distinct(name: str) -> str:
        return ", ".join(dict.fromkeys(str(record[name]) for record in records if record.get(name))) or "not recorded"

    dates = sorted(record[name][:10] for record in records for name in ("started", "ended") if name in record)
    counts = Counter(result.status for result in results)
    return ". ".join(
        [
            f"Commit {distinct('commit')}",
            f"Device {distinct('device')}",
            f"Date {' to '.join(dict.fromkeys((dates[0], dates[-1]))) if dates else 'not recorded'}",
            f"Seeds {', '.join(map(str, sorted({result.seed for result in results})))}",
            f"Trials: {', '.join(f'{count} {status}' for status, count in counts.items())}.",
        ]
    )


def _plain(table: Table) -> str:
    """For the terminal."""
    lines = [table.headers, *table.rows]
    widths = [max(len(row[i]) for row in lines) for i in range(len(table.headers))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in lines
    )
