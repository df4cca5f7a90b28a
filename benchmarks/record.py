"""Storage of measured figures: lists of JSON objects in benchmarks/results, one file for each device."""

import json
import os
import re
from pathlib import Path

from seqmodels.source import commit

__all__ = ["RESULTS", "commit", "device_name", "record", "slug"]

RESULTS = Path(__file__).parent / "results"


def device_name(device) -> str:
    """A JAX device's name in results. For a CPU it includes the number of cores that this process may use."""
    if device.platform != "cpu":
        return device.device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"cpu {cores} cores"


def slug(text: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def record(path: Path, result: dict, key: tuple[str, ...]) -> None:
    """Put `result` into the list in `path`. It replaces the result with equal values of `key`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else []
    results = [r for r in results if any(r.get(k) != result.get(k) for k in key)]
    new = path.with_suffix(".new")  # a run that is killed here leaves the old file complete
    new.write_text(json.dumps([*results, result], indent=1) + "\n")
    new.replace(path)
