"""minGRU (Feng et al. 2024, arXiv 2410.01201): a GRU whose gates do not read the state, so that training is parallel.

Command:   python train.py --config=configs/mingru.py --workdir=runs/mingru
Hardware:  2 CPU cores.
Expected:  validation 2.249, test 2.278 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)
Cost:      4 minutes of training on one CPU core (small)

Preset: small (no argument). It has the same number of parameters as that of configs/densemamba.py, within
2 %.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, preset
from seqmodels.fields.mingru import MINGRU
from seqmodels.fields.mlp import MLP


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small"])
    config = base()
    config.model.pattern = "mingru+mlp"
    config.model.mingru = MINGRU.defaults(hidden=192)
    config.model.mlp = MLP.defaults(hidden=112)
    return finish(config, "mingru", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Width of the state, kind of candidate and learning rate. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    for hidden in (128, 384):
        add({"model.mingru.hidden": hidden})
    add({"model.mingru.candidate": "positive"})
    for factor in (0.3, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})
