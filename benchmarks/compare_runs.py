"""Compares finished runs: a Markdown table and plots of their losses.

    python benchmarks/compare_runs.py runs/densemamba runs/mamba runs/transformer --out=docs/results/small

writes docs/results/small.md, small.png and other pictures whose names begin with small, from the config.json,
metrics.jsonl and summary.json of the runs.
"""

import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import commit
from seqmodels.sweeps import curves, results


def read(folder: Path) -> dict:
    """Figures of one run."""
    summary = json.loads((folder / "summary.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    return dict(
        name=folder.name,
        seed=config["seed"],
        steps=[row["step"] for row in rows],
        loss=[row["loss"] for row in rows],
        tokens_per_second=statistics.median(row["tokens_per_second"] for row in rows),
        parameters=summary["parameters"],
        splits=summary["splits"],
        tokens=config["batch_size"] * config["seq_len"] * summary["steps"],
    )


def table(runs: list[dict]) -> str:
    """Markdown table, one row per run."""
    lines = [
        "| model | parameters | training tokens | last 50 losses | validation bits/byte | test bits/byte | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        last = statistics.mean(run["loss"][-50:])
        bits = [f"{run['splits'][split]['bits_per_byte']:.4f}" for split in ("validation", "test")]
        lines.append(
            f"| {run['name']} | {run['parameters']:,} | {run['tokens']:,} | {last:.4f} | {bits[0]} | {bits[1]} "
            f"| {run['tokens_per_second']:,.0f} |"
        )
    xz = [f"{runs[0]['splits'][split]['xz_bits_per_byte']:.4f}" for split in ("validation", "test")]
    return "\n".join([*lines, f"| `xz -9` | | | | {xz[0]} | {xz[1]} | |"])


def plot(folders: list[Path], out: Path) -> list[Path]:
    """Draws the training losses as in the report of a sweep, as PNG and SVG; returns the PNGs, beside `out`."""
    groups = results.group(results.distinct(results.of_runs(folders)))
    drawn = []
    for name, _, figure in curves.figures(groups):
        place = out if name == "losses" else out.with_name(f"{out.name}_{name}")
        for kind in ("png", "svg"):
            figure.savefig(place.with_name(f"{place.name}.{kind}"), dpi=170)
        drawn.append(place.with_name(f"{place.name}.png"))
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories of finished runs")
    parser.add_argument("--out", type=Path, required=True, help="where to write, without ending")
    parser.add_argument("--device", default="", help="what the runs ran on, for the heading")
    options = parser.parse_args()
    missing = [str(run) for run in options.runs if not (run / "summary.json").exists()]
    if missing:
        parser.error(f"no summary.json in {', '.join(missing)}: these runs are not finished")
    runs = [read(run) for run in options.runs]
    names = " ".join(f"runs/{run['name']}" for run in runs)
    commands = [f"python train.py --config=configs/{run['name']}.py --workdir=runs/{run['name']}" for run in runs] + [
        f"python benchmarks/compare_runs.py {names} --out={options.out}"
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pictures = plot(options.runs, options.out)
    seeds = f"Seeds: {', '.join(map(str, sorted({run['seed'] for run in runs})))}. "
    made = f"Commit {commit()}. " if commit() else ""
    where = f" on {options.device}" if options.device else ""
    text = [
        f"# {', '.join(run['name'] for run in runs)}{where}, {datetime.date.today().isoformat()}",
        table(runs),
        "\n\n".join(f"![losses]({picture.name})" for picture in pictures),
        f"{seeds}{made}Made by\n\n```\n" + "\n".join(commands) + "\n```",
    ]
    options.out.with_suffix(".md").write_text("\n\n".join(text) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
