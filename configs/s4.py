"""S4 (Gu et al. 2022, arXiv 2111.00396): a linear system of HiPPO's matrix for each channel, and an MLP behind it.

Command:   python train.py --config=configs/s4.py --workdir=runs/s4
Hardware:  2 CPU cores.
Expected:  validation 2.323, test 2.349 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)

Presets: small (no argument), which has the same number of parameters as that of configs/densemamba.py within 2 %, and
dense, the same with DenseSSM's links (DenseS4): each layer's C also reads the states of the two layers below, by a
cross kernel for each (docs/densessm.md). A, B and dt have a smaller learning rate and no weight decay.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, preset
from seqmodels.fields.mlp import MLP
from seqmodels.fields.s4 import S4


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", "dense"])
    config = base()
    config.model.pattern = "s4+mlp"
    config.model.s4 = S4.defaults(state=32)
    config.model.mlp = MLP.defaults(hidden=176)
    if chosen == "dense":
        config.model.dense.variant = "read"
    config.optimizer.groups = "ssm=0.3"  # a rate of about 1e-3 for A, B and dt, as in the authors' recipes
    return finish(config, "s4", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """States and learning rate. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    for state in (8, 128):
        add({"model.s4.state": state})
    for factor in (0.3, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})
