"""Device time of each kernel in a jax.profiler trace."""

import collections
import re
import warnings
from pathlib import Path


def kernel_times(folder: str | Path, hlo: str = "") -> dict[str, tuple[int, float]]:
    """Maps each kernel to (runs, total milliseconds), the longest first.

    Kernels are named by what they compute, if `hlo` (the compiled program's text) contains that: the module's path in
    the model and the operation. Numbers are left out of the path, so that all layers count together.

    Args:
        folder: folder of jax.profiler.trace. The newest trace in it is used.
    """
    import jax

    newest = max(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    meanings = dict(re.findall(r'%?([\w.\-]+) = .*?metadata=\{[^}]*?op_name="([^"]*)"', hlo))
    totals = collections.defaultdict(lambda: [0, 0.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the binding's types have no __module__
        for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
            device = plane.name.startswith("/device:")
            for line in plane.lines:
                if device and not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    operation = dict(event.stats).get("hlo_op", "")
                    if not (device or operation):  # on the CPU, other work of the host
                        continue
                    total = totals[label(event.name, meanings.get(operation, ""))]
                    total[0] += 1
                    total[1] += event.duration_ns / 1e6
    return {name: tuple(total) for name, total in sorted(totals.items(), key=lambda item: -item[1][1])}


def label(kernel: str, meaning: str) -> str:
    """A kernel's name and meaning without numbers, wrappers of transformations, and the model's own name."""
    kernel = re.sub(r"[._]?\d+", "", kernel)
    backward = "backward " if "transpose(" in meaning else ""
    meaning = re.sub(
        r"jit\(\w+\)/|checkpoint/|rematted_computation/|eval_jaxpr/|(transpose|jvp)\(|LanguageModel|\)|backbone/|\w+\.run/",
        "",
        meaning,
    )
    meaning = re.sub(r"_\d+", "_*", meaning).strip("/")
    return f"{kernel}  {backward}{meaning}".strip()


def table(times: dict[str, tuple[int, float]], steps: int, rows: int) -> list[str]:
    """Lines with the longest kernels of a step, and the total time of the others."""
    total = sum(ms for _, ms in times.values())
    lines = [f"{'ms/step':>9} {'%':>5} {'runs':>6}  kernel"]
    for name, (runs, ms) in list(times.items())[:rows]:
        lines.append(f"{ms / steps:9.3f} {100 * ms / total:5.1f} {runs / steps:6.0f}  {name[:150]}")
    rest = list(times.values())[rows:]
    runs, ms = sum(r for r, _ in rest), sum(ms for _, ms in rest)
    lines.append(f"{ms / steps:9.3f} {100 * ms / total:5.1f} {runs / steps:6.0f}  the other {len(rest)}")
    runs = sum(r for r, _ in times.values())
    return [*lines, f"{total / steps:9.3f} {100.0:5.1f} {runs / steps:6.0f}  all kernels"]
