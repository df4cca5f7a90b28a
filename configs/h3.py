"""H3 (Fu et al. 2023, arXiv 2212.14052): two linear systems with products between them, and an MLP behind them.

Command:   python train.py --config=configs/h3.py --workdir=runs/h3
Hardware:  2 CPU cores.
Expected:  validation 2.131, test 2.165 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)

Preset: small (no argument). It has the same number of parameters as that of configs/densemamba.py, within 2 %. A, B and
dt have a smaller learning rate and no weight decay.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, preset
from seqmodels.fields.h3 import H3
from seqmodels.fields.mlp import MLP


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small"])
    config = base()
    config.model.pattern = "h3+mlp"
    config.model.h3 = H3.defaults(state=32)
    config.model.mlp = MLP.defaults(hidden=100)
    config.optimizer.groups = "ssm=0.3"  # a rate of about 1e-3 for A, B and dt, as in the authors' recipes
    return finish(config, "h3", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """States, the shift filter and learning rate. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    for state in (8, 128):
        add({"model.h3.state": state})
    add({"model.h3.conv": 2})
    for factor in (0.3, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})
