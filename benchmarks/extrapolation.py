"""Compares runs on rows longer than in training: a Markdown table and a plot over models and methods.

    for name in rope alibi none; do
        python train.py --config=configs/transformer.py --workdir=runs/$name --config.model.attention.positions=$name
    done
    python train.py --config=configs/mamba.py --workdir=runs/mamba
    python train.py --config=configs/retnet.py --workdir=runs/retnet
    lengths="--splits=test --config.evaluation.lengths=(1,2,4,8,16)"
    all=none,linear,ntk,dynamic,yarn,llama3,rerope,leaky_rerope,log_n,window
    python eval.py --workdir=runs/rope --evals=extrapolation --extrapolate=$all $lengths
    for name in alibi none; do
        python eval.py --workdir=runs/$name --evals=extrapolation --extrapolate=none,log_n,window $lengths
    done
    python eval.py --workdir=runs/mamba --evals=extrapolation --extrapolate=none,dt $lengths
    python eval.py --workdir=runs/retnet --evals=extrapolation $lengths
    python benchmarks/extrapolation.py runs/rope runs/alibi runs/none runs/mamba runs/retnet \
        --out=docs/results/extrapolation --device="1 x NVIDIA H200"

writes docs/results/extrapolation.md and extrapolation.png from the eval.json of the runs.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import commit

Losses = dict[str, dict[int, float | None]]  # "model, method" to length to loss; None: not served


def read(folder: Path, split: str) -> tuple[Losses, int]:
    """The losses of a run by its name and method, and the tokens of a row in its training."""
    figures = json.loads((folder / "eval.json").read_text())["extrapolation"][split]
    trained = json.loads((folder / "config.json").read_text())["seq_len"]
    rows = {
        folder.name if method == "none" else f"{folder.name}, {method}": {
            int(length): row.get("loss") for length, row in by_length.items()
        }
        for method, by_length in figures.items()
    }
    return rows, trained


def table(losses: Losses) -> str:
    """Markdown table: a row for each model and method, a column for each length."""
    lengths = sorted({length for by_length in losses.values() for length in by_length})
    lines = [f"| nats a token after | {' | '.join(map(str, lengths))} |", "|---|" + "---:|" * len(lengths)]
    for name, by_length in losses.items():
        cells = ("–" if (loss := by_length.get(n)) is None else f"{loss:.4f}" for n in lengths)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(losses: Losses, trained: int, path: Path) -> None:
    """One line for each model (thick) and each of its methods (thin, dashed)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, by_length in losses.items():
        served = [(length, loss) for length, loss in by_length.items() if loss is not None]
        if served:
            style = dict(linestyle="--", linewidth=1) if "," in name else dict(linewidth=2.5)
            axes.plot(*zip(*served, strict=True), marker="o", markersize=3, label=name, **style)
    axes.axvline(trained, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel=f"tokens of the row (trained on {trained})", ylabel="nats a token, last tokens")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories with the figures of --evals=extrapolation")
    parser.add_argument("--out", type=Path, required=True, help="where to write, without ending")
    parser.add_argument("--split", default="test")
    parser.add_argument("--device", default="", help="what the runs ran on, for the heading")
    options = parser.parse_args()
    losses: Losses = {}
    lengths = set()
    for run in options.runs:
        try:
            rows, trained = read(run, options.split)
        except (OSError, KeyError) as error:
            parser.error(f"{run}/eval.json has no figures of --evals=extrapolation on {options.split}: {error}")
        losses |= rows
        lengths.add(trained)
    if len(lengths) > 1:
        parser.error(f"the runs were trained on rows of different lengths: {sorted(lengths)}")
    where = f" on {options.device}" if options.device else ""
    made = f" Commit {commit()}." if commit() else ""
    text = [
        f"# Rows longer than in training{where}, {datetime.date.today().isoformat()}",
        f"Loss of the last tokens of rows of so many tokens ({options.split} split), trained on {trained}.{made} "
        "The docstring of benchmarks/extrapolation.py has the commands; docs/positions.md explains the methods.",
        table(losses),
        f"![losses]({options.out.name}.png)",
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".md").write_text("\n\n".join(text) + "\n")
    plot(losses, trained, options.out.with_suffix(".png"))
    print(table(losses))


if __name__ == "__main__":
    main()
