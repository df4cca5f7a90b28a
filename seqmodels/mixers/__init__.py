"""Branches that mix time. seqmodels/branches.py lists them by name.

As a module of another model: `seqmodels.mixers.Mamba(width=64)`; see `alone.py`.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from seqmodels.mixers.alone import mixer

    return mixer(name)


def __dir__() -> list[str]:
    from seqmodels.mixers.alone import names

    return sorted([*globals(), *names()])
