"""Write what the trials of every sweep of every preset are called: python tests/golden/trials.py

A trial is the directory of its run, so a sweep that is half done goes on only if its trials keep their names. One line
of trials.txt is a sweep: config, sweep, number of trials, and a hash of their names in order. Lines of old sweeps must
not change, whatever fields configs get.
"""

import hashlib
import pathlib
import sys
from collections.abc import Iterator

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FILE = HERE / "trials.txt"


def specs() -> list[str]:
    """`configs/NAME.py:PRESET` of every preset that has a golden file; without PRESET where it is "small"."""
    parts = (path.stem.partition("-")[::2] for path in sorted(HERE.glob("*.json")))
    return [f"configs/{name}.py" + (f":{preset}" if preset != "small" else "") for name, preset in parts]


def lines(spec: str) -> Iterator[str]:
    """The lines of one preset's sweeps."""
    sys.path.insert(0, str(ROOT))
    from seqmodels import cli
    from seqmodels.sweeps.definition import define

    place = str(ROOT / spec)
    config, module = cli.load_config(place), cli.load_module(place)
    sweeps = (["ablation"] if hasattr(module, "sweep") else []) + list(getattr(module, "SWEEPS", {}))
    for sweep in sweeps:
        names = [trial.id for trial in define(place, config, sweep, 1, pathlib.Path("sweeps"))]
        yield f"{spec} {sweep} {len(names)} {hashlib.sha256(' '.join(names).encode()).hexdigest()[:16]}"


if __name__ == "__main__":
    FILE.write_text("".join(f"{line}\n" for spec in specs() for line in lines(spec)))
