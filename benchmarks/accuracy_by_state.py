"""Plots accuracy on a synthetic task, or the horizon, against the bytes of state per row, for any evaluated runs.

    python benchmarks/accuracy_by_state.py sweeps/mqar/trials/* --out=docs/results/mqar_by_state
    python benchmarks/accuracy_by_state.py sweeps/words/trials/* --figure=horizon --out=docs/results/words_by_state

writes docs/results/mqar_by_state.png and .md from the runs' config.json, summary.json and eval.json. A line joins the
runs of one model (pattern and dense links), from the smallest state to the largest. Several runs of one size, such as
seeds, are plotted at their mean, with a bar from the worst to the best.
"""

import argparse
import datetime
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import commit
from seqmodels.sweeps.trial import read_json

FIGURES = {  # of eval.json, by the option --figure: what is shown of it, with its heading and format
    "accuracy": dict(accuracy="accuracy", sequence_accuracy="rows all right"),
    "horizon": dict(horizon="horizon, tokens", accuracy="accuracy"),
}
FORMATS = dict(accuracy=".4f", sequence_accuracy=".4f", horizon=",.0f")
MADE = ("device", "commit")  # fields that the trials of a sweep record themselves


def read(folder: Path, split: str, figure: str) -> dict:
    """Figures of one run. Raises ValueError if it has none."""
    try:
        config, summary, figures = (
            json.loads((folder / f"{name}.json").read_text()) for name in ("config", "summary", "eval")
        )
        shown = {name: figures[name] if name == "horizon" else figures[name][split] for name in FIGURES[figure]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: no {figure} on {split} in eval.json ({error!r}); run `python eval.py --workdir={folder}`"
        ) from error
    model, dense = config["model"]["pattern"], config["model"]["dense"]["variant"]
    return dict(
        model=model if dense == "none" else f"{model}, dense {dense}",
        width=config["model"]["width"],
        task=config["data"]["name"],
        seed=config["seed"],
        parameters=summary["parameters"],
        state_bytes=figures["state_bytes"],
        **shown,
        record=read_json(folder / "trial.json"),  # empty for runs outside a sweep
    )


def grouped(runs: list[dict]) -> dict[str, dict[int, list[dict]]]:
    """Maps model to bytes of state, in increasing order, to runs."""
    groups = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: (run["model"], run["state_bytes"], run["seed"])):
        groups[run["model"]][run["state_bytes"]].append(run)
    return groups


def table(runs: list[dict], figure: str) -> str:
    """Markdown table, one row per model and size."""
    lines = [f"| model | width | parameters | state bytes | runs | {' | '.join(FIGURES[figure].values())} |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for model, sizes in grouped(runs).items():
        for state_bytes, same in sizes.items():
            cells = []
            for name in FIGURES[figure]:
                values, form = [run[name] for run in same], FORMATS[name]
                spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):{form}}{spread}")
            widths = ", ".join(str(width) for width in sorted({run["width"] for run in same}))
            parameters = ", ".join(f"{n:,}" for n in sorted({run["parameters"] for run in same}))
            lines.append(f"| {model} | {widths} | {parameters} | {state_bytes:,} | {len(same)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(runs: list[dict], path: Path, figure: str) -> None:
    """Plot one line per model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for model, sizes in grouped(runs).items():
        values = [[run[figure] for run in same] for same in sizes.values()]
        means = [statistics.mean(some) for some in values]
        bars = [[mean - min(some) for mean, some in zip(means, values, strict=True)],
                [max(some) - mean for mean, some in zip(means, values, strict=True)]]  # fmt: skip
        axes.errorbar(list(sizes), means, yerr=bars, marker="o", capsize=3, label=model)
    axes.set(xscale="log", xlabel="bytes of state a row", ylabel=FIGURES[figure][figure])
    if figure == "accuracy":
        axes.set(ylim=(-0.02, 1.02))
    axes.set_title(", ".join(sorted({run["task"] for run in runs})))
    axes.grid(alpha=0.3)
    axes.legend()
    picture.savefig(path, dpi=120)
    pyplot.close(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories with an eval.json")
    parser.add_argument("--out", type=Path, required=True, help="where to write, without ending")
    parser.add_argument("--figure", default="accuracy", choices=FIGURES, help="what is shown against the bytes")
    parser.add_argument("--split", default="test", help="of the accuracy")
    parser.add_argument("--device", default="", help="what the runs ran on, unless they say it")
    options = parser.parse_args()
    try:
        runs = [read(run, options.split, options.figure) for run in options.runs]
    except ValueError as error:
        parser.error(str(error))
    named = "" if options.figure == "accuracy" else f" --figure={options.figure}"
    command = f"python benchmarks/accuracy_by_state.py {' '.join(map(str, options.runs))}{named} --out={options.out}"
    devices, commits = (", ".join(sorted({run["record"].get(name, "") for run in runs} - {""})) for name in MADE)
    commits = commits or commit()
    made = [datetime.date.today().isoformat(), options.device or devices, f"commit {commits}" if commits else ""]
    text = [
        f"# {options.figure.capitalize()} against state: {', '.join(sorted({run['task'] for run in runs}))}",
        f"{', '.join(filter(None, made))}. Seeds: {', '.join(map(str, sorted({run['seed'] for run in runs})))}.",
        table(runs, options.figure),
        f"![{options.figure} against state]({options.out.name}.png)",
        f"Made by\n\n```\n{command}\n```",
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".md").write_text("\n\n".join(text) + "\n")
    plot(runs, options.out.with_suffix(".png"), options.figure)
    print(table(runs, options.figure))


if __name__ == "__main__":
    main()
