"""What an evaluation leaves behind: a JSON file and a picture."""

import json
from pathlib import Path
from types import ModuleType

from seqmodels.errors import UserError


def write_json(path: Path, figures: dict) -> None:
    """Raises UserError where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out={path}: cannot be written ({error.strerror})") from error


def plot(path: Path, evaluators: dict[str, ModuleType], figures: dict, title: str) -> bool:
    """One panel for each evaluator that can draw. Returns whether there was any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [evaluator for evaluator in evaluators.values() if hasattr(evaluator, "plot")]
    if not panels:
        return False
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False, layout="constrained")
    for panel, evaluator in zip(axes[0], panels, strict=True):
        evaluator.plot(panel, figures)
        panel.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True
