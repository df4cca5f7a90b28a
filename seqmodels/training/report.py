"""What a run prints at the start and at the end."""

import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from seqmodels.atomic import json_text, replace_file, writing
from seqmodels.errors import NOT_FINITE, UserError
from seqmodels.training import metrics


def devices(mesh: jax.sharding.Mesh) -> str:
    """`device   8 x NVIDIA H100 (gpu), mesh data=4 tensor=2`."""
    first = mesh.devices.flat[0]
    axes = " ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
    return f"device   {mesh.size} x {first.device_kind} ({first.platform})" + (f", mesh {axes}" if axes else "")


def parameter_table(params: Any) -> str:
    """Table of parameters by module: how many alike, shape, dtype, sharding and number of values.

    Args:
      params: tree of arrays or jax.ShapeDtypeStruct, with shardings. Modules that differ only by a number in their name
        (`layer_0`, `layer_1`) share a line, if their shapes agree.
    """
    groups = defaultdict(list)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(re.sub(r"\d+$", "*", key.key) for key in path)
        groups[name, leaf.shape, str(leaf.dtype), _placement(leaf.sharding)].append(math.prod(leaf.shape))
    rows = [("parameter", "count", "shape", "dtype", "sharding", "values")]
    for (name, shape, dtype, spec), sizes in groups.items():
        rows.append((name, f"{len(sizes)} x", " x ".join(map(str, shape)) or "-", dtype, spec, f"{sum(sizes):,}"))
    total = sum(sum(sizes) for sizes in groups.values())
    rows.append(("total", "", "", "", "", f"{total:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(w) if i in (1, 5) else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _placement(placed) -> str:
    """Which mesh axes each axis of an array is split over, such as `fsdp tensor` or `- tensor`."""
    if not isinstance(placed, jax.sharding.NamedSharding):
        return "whole"
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in placed.spec]
    split = ["+".join(axis for axis in entry if axis and placed.mesh.shape[axis] > 1) or "-" for entry in entries]
    return " ".join(split) if set(split) - {"-"} else "whole"


def state_bytes(model: nn.Module, length: int) -> int:
    """Bytes of recurrent state (or cache for `length` tokens) that one sequence needs in decoding.

    A model in which outputs depend on later positions has no state: 0.
    """
    if not model.causal:
        return 0
    leaves = jax.tree.leaves(jax.eval_shape(lambda: model.init_state(1, length)))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def plot_loss(workdir: Path, path: Path, unit: str = "nats a token") -> None:
    """Draws training (and validation) loss over steps into the picture `path`."""
    from matplotlib.figure import Figure  # pyplot would open windows, and take longer to import

    rows = metrics.read(Path(workdir) / "metrics.jsonl")
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    curves = (
        ("loss", "training", "-"),
        ("validation_loss", "validation, during training", "o-"),
        ("validation.loss", "validation, at the end", "D"),
    )
    for name, label, style in curves:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=3)
    axes.set(xlabel="step", ylabel=f"loss ({unit})", title=Path(workdir).absolute().name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def write_summary(workdir: Path, summary: dict) -> None:
    path = Path(workdir) / "summary.json"
    with writing(path):
        replace_file(path, json_text(summary))


def read_summary(workdir: Path) -> dict | None:
    """The summary of a finished run. None if there is none, or, with a line on stderr, if the file is damaged.

    Raises: UserError where the system refuses to read it.
    """
    path = Path(workdir) / "summary.json"
    try:
        summary = json.loads(path.read_text())
        splits = summary["splits"]
        values = [value for figures in splits.values() for value in figures.values()]
        if type(summary["steps"]) is not int or any(type(value) not in (int, float, type(None)) for value in values):
            raise TypeError("no summary")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        print(f"{path} is damaged; it is made anew", file=sys.stderr, flush=True)
        return None
    for figures in splits.values():  # JSON has no NaN
        figures |= {name: math.nan for name, value in figures.items() if value is None}
    return summary


def diverged(summary: dict) -> str:
    """Why a run that has all its steps is not done; "" if it is."""
    losses = {f"{split} loss": figures.get("loss", 0.0) for split, figures in summary.get("splits", {}).items()}
    losses |= {"training loss": math.nan} if summary.get("status") == "diverged" else {}
    bad = next((name for name, loss in losses.items() if not math.isfinite(loss)), "")
    return f"the {bad} after {summary['steps']} steps is {NOT_FINITE}" if bad else ""


def headline(figures: dict[str, float]) -> str:
    """The figures of a split in one line: those of a text, of a synthetic task, or of the model's head."""
    if "bits_per_byte" not in figures and "sequence_accuracy" not in figures:
        return "   ".join(f"{name} {value:.4f}" for name, value in figures.items())
    if "accuracy" in figures:
        return (
            f"{figures['accuracy']:.4f} of the answers right   (of the rows, all answers: "
            f"{figures['sequence_accuracy']:.4f})   {figures['loss']:.4f} nats an answer"
        )
    xz = f"   (xz -9: {figures['xz_bits_per_byte']:.4f})" if "xz_bits_per_byte" in figures else ""
    return f"{figures['bits_per_byte']:.4f} bits per byte{xz}   perplexity {figures['perplexity']:.3f}"


def result(summary: dict) -> str:
    """The end of a run: how good it is (bits per byte beside xz's), a sample of text, and where the picture is."""
    lines = ["", f"trained {summary['steps']} steps"]
    part = f"   ({summary['rows']} of its rows)" if summary.get("rows") else ""
    lines += [f"{split:10}  {headline(figures)}{part}" for split, figures in summary["splits"].items()]
    if summary.get("sample"):
        lines += ["", "sample:", summary["sample"]]
    if summary.get("plot"):
        lines += ["", f"loss curve: {summary['plot']}"]
    return "\n".join(lines)
