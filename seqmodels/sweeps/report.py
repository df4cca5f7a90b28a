"""The report of a sweep: results.csv, report.md, report.html, tables.tex, pictures; each is replaced in one step."""

from collections import Counter
from pathlib import Path
from typing import Any

from seqmodels.atomic import replace_file
from seqmodels.claim import waited
from seqmodels.errors import UserError
from seqmodels.nearest import nearest
from seqmodels.sweeps import plots, tables
from seqmodels.sweeps.markup import Block, Code, Heading, Picture, Table, latex, markdown, page
from seqmodels.sweeps.results import Group, Result, at_equal_time, group, write_csv

QUALITY = ("validation.loss", "train_loss")  # the first that is there is the metric, if none is named
LOG_LINES = 40  # of a failed trial, in the HTML


def write(folder: Path, *arguments: Any) -> str:
    """As `compose`, but only one process of a sweep writes at a time. Arguments are those of `compose`."""
    with waited(folder / "sweep.lock"):
        return compose(folder, *arguments)


def compose(folder: Path, title: str, results: list[Result], command: str, metric: str = "") -> str:
    """Writes results.csv, report.md, report.html, tables.tex and the pictures, and returns the first tables as text.

    Args:
      command: the commands that made the results.
      metric: a figure's name, for the comparison and the plots; "" takes the first of QUALITY that is there.

    Raises: UserError for a metric that no result has; OSError where a file cannot be written.
    """
    time = at_equal_time(results)
    groups = group(results)
    write_csv(folder / "results.csv", results)
    metric = _metric(results, metric)
    first, second = tables.results(groups, metric), tables.costs(groups, metric)
    blocks: list[Block] = [first, _note(groups, metric), *tables.best_rates(groups, metric)]
    pictures = plots.pictures(groups, metric)
    _replace_pictures(folder, pictures)
    blocks += pictures
    if second.rows:
        blocks += [Heading("Training and cost"), second]
        if time is not None:
            blocks.append(f"Equal time is {time:,.1f} s in training steps, when the first run ended.")
    blocks += tables.evaluations(groups)
    blocks += _unfinished(results)
    blocks += [Heading("How it was made"), Code(command), _provenance(results)]
    replace_file(folder / "report.md", markdown(title, _brief(blocks)))
    replace_file(folder / "report.html", page(title, blocks))
    replace_file(folder / "tables.tex", latex(title, blocks))
    return "\n\n".join(_plain(table) for table in (first, second) if table.rows)


def _replace_pictures(folder: Path, pictures: list[Picture]) -> None:
    """Writes the pictures, and removes those that a report of fewer results does not have."""
    files = {f"{picture.name}.{kind}": data for picture in pictures
             for kind, data in (("png", picture.png), ("svg", picture.svg))}  # fmt: skip
    for name in plots.NAMES:
        for kind in ("png", "svg"):
            if f"{name}.{kind}" not in files:
                (folder / f"{name}.{kind}").unlink(missing_ok=True)
    for name, data in files.items():
        replace_file(folder / name, data)


def _metric(results: list[Result], metric: str) -> str:
    names = list(dict.fromkeys(name for result in results if result.status == "done" for name in result.figures))
    if metric and names and metric not in names:
        raise UserError(f"--metric={metric}: no such figure{nearest(metric, names)}")
    return metric or next((name for name in QUALITY if name in names), QUALITY[0])


def _note(groups: list[Group], metric: str) -> str:
    controls = any(each.control for each in groups)
    difference = "difference from the trial compared with" if controls else f"difference from {groups[0].number}"
    text = (
        f"± is the sample standard deviation over seeds. The {difference} is that of {metric}, seed by seed, its mean "
        "over the seeds that both have."
    )
    if any(len(each.values(metric)) > 1 for each in groups):
        text += " A 95% interval is Student's t-interval of the mean over seeds; with two seeds it is wide."
    return text


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
