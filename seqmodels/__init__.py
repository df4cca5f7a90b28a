"""Sequence models beyond attention, in JAX and Flax: kernels, mixers, configs, training, evaluation and sweeps.

    import seqmodels as sq

    run = sq.load("runs/densemamba")                                  # a run directory
    run = sq.from_pretrained("mamba-130m-hf")                         # weights of transformers
    sq.train(sq.configs.mamba("small", steps=100), workdir="runs/x")  # what train.py does
    y, state = sq.mixers.Mamba(width=64).apply(variables, x)          # a mixer in another model

Nothing is imported before it is asked for. docs/python.md has examples.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqmodels import configs, mixers
    from seqmodels.trained import Trained, from_pretrained, load
    from seqmodels.training.loop import train

__all__ = ["Trained", "configs", "from_pretrained", "load", "mixers", "train"]
__version__ = "0.2.0"

_PLACES = {
    "Trained": "seqmodels.trained",
    "from_pretrained": "seqmodels.trained",
    "load": "seqmodels.trained",
    "train": "seqmodels.training.loop",
}


def __getattr__(name: str) -> Any:
    if name in ("configs", "mixers"):
        return importlib.import_module(f"seqmodels.{name}")
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'seqmodels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
