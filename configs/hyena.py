"""Hyena (Poli et al. 2023, arXiv 2302.10866): long convolutions with implicit filters, gates, and an MLP behind them.

Command:   python train.py --config=configs/hyena.py --workdir=runs/hyena
Hardware:  2 CPU cores.
Expected:  validation 2.350, test 2.376 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)

Preset: small (no argument). It has the same number of parameters as that of configs/densemamba.py, within 2 %.
Hyena has no state of a constant size: it decodes from a cache of all tokens.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, preset
from seqmodels.fields.hyena import HYENA
from seqmodels.fields.mlp import MLP


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small"])
    config = base()
    config.model.pattern = "hyena+mlp"
    config.model.hyena = HYENA.defaults(length=256)
    config.model.mlp = MLP.defaults(hidden=88)
    return finish(config, "hyena", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Features of the filters and learning rate. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    for bands in (4, 16):
        add({"model.hyena.bands": bands})
    for factor in (0.3, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})
