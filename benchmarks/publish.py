"""Copies a sweep's results into docs/results, and writes its table into a page between two marks.

    python benchmarks/publish.py sweeps/densemamba --out=docs/results/densemamba
    python benchmarks/publish.py sweeps/densemamba --out=docs/results/densemamba --page=README.md

copies results.csv, report.md and the pictures of a sweep, which sweep.py wrote. Each picture is published once: as a
small SVG, which report.md then links, or, where there is only a PNG, with 256 colours. With --page it writes a short
table of results.csv into that page, in place of the text between <!-- NAME --> and <!-- /NAME -->, where NAME is the
last part of --out. --figures adds columns of results.csv to the table, such as
eval.context_lengths.test.65536.loss. The table of a comparison (sweep.py --compare) is that of the best learning rate
of each model.

    python benchmarks/publish.py docs/results/parity --redraw

draws the pictures of a published sweep again, as far as its results.csv says what is in them: not the curves of losses.
"""

import argparse
import csv
import io
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seqmodels.sweeps import plots
from seqmodels.sweeps.labels import labels
from seqmodels.sweeps.results import EQUAL_TIME, RATE, Result, group
from seqmodels.sweeps.spread import mean_and_spread
from seqmodels.sweeps.tables import INTERVAL
from seqmodels.sweeps.trial import read_json

OLD = ("bars", "quality")  # pictures of earlier versions
TABLES = ("results.csv", "tables.tex")
FIGURES = {  # columns of the short table, with their headings and formats
    "parameters": ("parameters", ",.0f"),
    "validation.loss": ("validation loss, nats a token", ".4f"),
    "validation.bits_per_byte": ("bits a byte", ".4f"),
    "test.accuracy": ("accuracy", ".4f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    EQUAL_TIME: ("training loss at equal time", ".4f"),
}
LEFT_OUT = ("#", "of rates", INTERVAL)  # columns of the best rates that only the report has
COUNTS = {"eval.horizon": ",.0f", "eval.state_bytes": ",.0f"}  # formats of further columns that are no shares


def read(sweep: Path) -> dict[str, list[dict]]:
    """Finished rows of a sweep's results.csv by label, so that the seeds of a trial are together."""
    with (sweep / "results.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "done"]
    set_fields = [read_json(sweep / "trials" / row["id"] / "trial.json").get("overrides", {}) for row in rows]
    against = read_json(sweep / "sweep.json").get("against", {})
    groups: dict[str, list[dict]] = {}
    for row, label in zip(rows, labels(set_fields), strict=True):
        row["against"] = against.get(row["id"], "")
        groups.setdefault(label, []).append(row)
    return groups


def table(groups: dict[str, list[dict]], metric: str = "validation.loss", further: Sequence[str] = ()) -> str:
    """Markdown table, one row per trial. After the metric comes its difference from the first trial's, seed by seed, or
    from that of the trial that it is compared with.

    Raises: ValueError for further figures that no trial has.
    """
    there = {name for rows in groups.values() for row in rows for name, cell in row.items() if cell}
    if missing := [name for name in further if name not in there]:
        raise ValueError(f"--figures={','.join(missing)}: in no row of results.csv that is done")
    figures = {name: about for name, about in FIGURES.items() if name in there}
    controls = {row["id"]: row for rows in groups.values() for row in rows} if "against" in there else {}
    figures |= {name: (name.removeprefix("eval."), COUNTS.get(name, ",.4f")) for name in further}
    heading = [
        cell
        for name, (text, _) in figures.items()
        for cell in (
            text,
            *[f"difference from {'the one compared with' if controls else 'the first'}"] * (name == metric),
        )
    ]
    lines = [f"| trial | seeds | {' | '.join(heading)} |", f"|---|---{'|---:' * len(heading)}|"]
    first = next(iter(groups.values()), [])
    for label, rows in groups.items():
        cells = [label, str(len(rows))]
        for name, (_, form) in figures.items():
            cells.append(figure([float(row[name]) for row in rows if row[name]], form))
            if name == metric:
                base = {row["seed"]: row for row in first}
                pairs = [(row, controls.get(row["against"]) or base.get(row["seed"], {})) for row in rows]
                less = [float(a[name]) - float(b[name]) for a, b in pairs if a[name] and b.get(name) and a is not b]
                cells.append(figure(less, "+" + form) if less or rows is not first else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(values: list[float], form: str) -> str:
    """Mean and sample standard deviation."""
    mean, spread = mean_and_spread(values)
    if not values:
        return "–"
    return f"{mean:{form}}" + (f" ± {spread:{form.lstrip('+')}}" if spread else "")


def redraw(folder: Path) -> list[str]:
    """Draws the pictures of results.csv, and names them in report.md in place of the old ones; returns their names."""
    with (folder / "results.csv").open(newline="") as file:
        table = csv.DictReader(file)
        names = list(table.fieldnames or [])
        rows = list(table)
    first = names.index("steps_done")  # before it are the fields that the sweep sets, behind it the figures
    fields = [{name: row[name] for name in names[3:first] if row[name]} for row in rows]
    models = labels([{name: value for name, value in each.items() if name != RATE} for each in fields])
    found = []
    for row, label, model, each in zip(rows, labels(fields), models, fields, strict=True):
        result = Result(row["id"], folder, label, int(row["seed"]), {"status": row["status"]}, each)
        result.figures = {name: float(row[name]) for name in names[first:] if row[name]}
        if RATE in each:
            result.model, result.rate = model, float(each[RATE])
        found.append(result)
    report = (folder / "report.md").read_text()
    metric = re.search(r"^!\[(\S+) (?:of each trial|against )", report, re.MULTILINE)
    if not metric:
        raise ValueError(f"{folder / 'report.md'}: names no picture of a metric")
    drawn = plots.pictures(group(found), metric[1])
    ours = [*OLD, *(picture.name for picture in drawn)]
    before, *after = re.split(rf"!\[[^\]]*\]\((?:{'|'.join(ours)})\.(?:png|svg)\)\n*", report)
    lines = "".join(f"![{picture.description}]({picture.name}.svg)\n\n" for picture in drawn)
    (folder / "report.md").write_text(before + lines + "".join(after))
    for picture in drawn:
        (folder / f"{picture.name}.svg").write_text(small_svg(picture.svg.decode()))
    for name in ours:
        (folder / f"{name}.png").unlink(missing_ok=True)
    return [picture.name for picture in drawn]


def copy(sweep: Path, out: Path) -> None:
    """Copies what a reader needs of a sweep: its tables, its report, and each picture once."""
    out.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        if (sweep / name).exists():
            shutil.copyfile(sweep / name, out / name)
    drawn = {path.stem for path in sweep.glob("*.svg")}
    for name in drawn:
        (out / f"{name}.svg").write_text(small_svg((sweep / f"{name}.svg").read_text()))
        (out / f"{name}.png").unlink(missing_ok=True)  # of an earlier version
    for path in sweep.glob("*.png"):
        if path.stem not in drawn:
            (out / path.name).write_bytes(small_png(path.read_bytes()))
    report = (sweep / "report.md").read_text()
    links = re.sub(r"(?<=\]\()(\w+)\.png(?=\))", lambda link: f"{link[1]}.svg" if link[1] in drawn else link[0], report)
    (out / "report.md").write_text(links)


def small_svg(text: str) -> str:
    """An SVG of Matplotlib's with positions to a hundredth of a point, and without names of fonts that few have."""

    def shorter(tag: re.Match) -> str:
        inside = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), tag[0])
        inside = re.sub(r" *\n(?=[A-Za-z] )", "", inside)  # each part of a path is a line
        return re.sub(r"font-family: [^;\"]*", "font-family: 'DejaVu Sans', sans-serif", inside)

    return re.sub(r"<[^>]*>", shorter, text)  # texts between the tags may contain numbers, too


def small_png(data: bytes) -> bytes:
    """The same picture with a palette of 256 colours, so chosen that thin lines keep theirs."""
    from PIL import Image

    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    palette = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    palette.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def best_rates(report: str) -> str:
    """The table of a report that has the best learning rate of each model, without the columns of LEFT_OUT.

    Raises: ValueError where there is none.
    """
    _, heading, rest = report.partition("\n## Best learning rate of each model\n")
    if not heading:
        raise ValueError("report.md: has no learning rates to choose from; compare sweeps of optimizer.learning_rate")
    rows = [line.strip("|").split("|") for line in rest.strip().split("\n\n")[0].splitlines()]
    # The report's "difference from 3" counts trials by numbers that are left out here.
    names = [re.sub(r"^difference from \d+$", "difference from the first", name.strip()) for name in rows[0]]
    rows[0] = [f" {name} " for name in names]
    kept = [column for column, name in enumerate(names) if name not in LEFT_OUT]
    return "\n".join(f"|{'|'.join(row[column] for column in kept)}|" for row in rows)


def insert(page: Path, name: str, text: str) -> None:
    """Replace the text between the marks of `name`. Raises ValueError unless each mark occurs exactly once."""
    before = page.read_text()
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if before.count(begin) != 1 or before.count(end) != 1 or before.index(begin) > before.index(end):
        raise ValueError(f"{page}: must have {begin} and {end}, once each")
    head, rest = before.split(begin)
    page.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="directory of a sweep")
    parser.add_argument("--redraw", action="store_true", help="draw the pictures of a published sweep again")
    parser.add_argument("--out", type=Path, help="directory, such as docs/results/densemamba")
    parser.add_argument("--page", type=Path, help="Markdown file with the marks")
    parser.add_argument("--figures", default="", help="further columns of the table, apart by commas")
    options = parser.parse_args()
    if not options.redraw and not options.out:
        parser.error("--out is missing")
    if not (options.sweep / "report.md").exists():
        parser.error(f"{options.sweep}: no report.md in it; sweep.py writes one")
    try:
        if options.redraw:
            print(" ".join(redraw(options.sweep)))
            return
        if (options.sweep / "sweep.json").exists() or (options.sweep / "trials").exists():
            text = table(read(options.sweep), further=list(filter(None, options.figures.split(","))))
        else:
            text = best_rates((options.sweep / "report.md").read_text())
        copy(options.sweep, options.out)
        print(text)
        if options.page:
            link = os.path.relpath(options.out / "report.md", options.page.parent)
            insert(options.page, options.out.name, f"\n{text}\n\nAll of it: [{link}]({link}).\n")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
