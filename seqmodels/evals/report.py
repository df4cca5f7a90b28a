"""The results of an evaluation: tables on the terminal, a JSON file and a picture."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from seqmodels.atomic import json_text, replace_file, writing
from seqmodels.errors import describe
from seqmodels.evals.run import Run

COLUMNS = 3  # of panels in a picture


def evaluate(
    run: Run,
    evaluators: dict[str, ModuleType],
    *,
    splits: list[str],
    limit: int | None,
    out: Path,
    say: Callable[[str], None] = print,
    write: bool = True,
    about: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[dict, list[str]]:
    """Runs evaluators one after another.

    Args:
      run: a `seqmodels.evals.run.Run`.
      evaluators: as of `seqmodels.evals.find`.
      splits, limit: see docs/evaluation.md.
      out: JSON file; the picture has the same name with .png.
      say: called with each table when it is ready.
      write: False on all processes but the first.
      about: more that the file says, such as which other data were read.

    Returns: the figures of all evaluators, as in the file; and a message for each that could not be run.
    """
    title = f"{run.config.name}, step {run.step:,}"
    say(f"{title}, contexts of {run.config.seq_len} tokens")
    figures, done, failed = {"name": run.config.name, "step": run.step, "limit": limit, **about}, {}, []
    for name, evaluator in evaluators.items():
        try:
            result = evaluator.evaluate_run(run, splits, limit)
            text = evaluator.table(result)
        except Exception as error:  # of any type: the figures of the other evaluators are as good without
            failed.append(f"{name}: {describe(error)}")
            continue
        done[name] = evaluator
        figures |= result
        say("\n" + text)
    if write:
        write_json(out, figures)
        say(f"\nwritten {out}")
        picture = out.with_suffix(".png")
        try:
            if plot(picture, done, figures, title):
                say(f"written {picture}")
        except Exception as error:  # of the library of pictures, or of the disk
            failed.append(f"{picture}: {describe(error)}")
    return figures, failed


def scalars(figures: dict, prefix: str = "eval") -> Iterator[tuple[str, float]]:
    """Dotted name, such as eval.loss.test, and value of each number in the figures."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}.{name}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}.{name}", value


def write_json(path: Path, figures: dict) -> None:
    """Raises UserError where the file cannot be written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json_text(figures))


def plot(path: Path, evaluators: dict[str, ModuleType], figures: dict, title: str) -> bool:
    """One panel for each plot of each evaluator. Returns whether there was any."""
    from matplotlib.figure import Figure

    panels = [draw for evaluator in evaluators.values() for draw in plots(evaluator)]
    if not panels:
        return False
    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6 * columns, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel, draw in zip(axes.flat, panels, strict=False):
        draw(panel, figures)
        panel.grid(alpha=0.3)
    for panel in axes.flat[len(panels) :]:
        panel.set_axis_off()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    return True


def plots(evaluator: ModuleType) -> tuple[Callable, ...]:
    """What an evaluator can draw."""
    return getattr(evaluator, "PLOTS", None) or ((evaluator.plot,) if hasattr(evaluator, "plot") else ())
