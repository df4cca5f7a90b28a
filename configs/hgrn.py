"""HGRN (Qin et al. 2023, arXiv 2311.04823): a gated linear recurrence whose decays have a bound that rises with depth.

Command:   python train.py --config=configs/hgrn.py --workdir=runs/hgrn
Hardware:  2 CPU cores.
Expected:  validation 2.138, test 2.172 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)
Cost:      5 minutes of training on one CPU core (small)

Preset: small (no argument). It has the same number of parameters as that of configs/densemamba.py, within
2 %. All blocks are unrolled (model.scan_blocks=0), as a fresh block depends on its place in the stack.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, preset
from seqmodels.fields.hgrn import HGRN
from seqmodels.fields.mlp import MLP


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small"])
    config = base()
    config.model.pattern = "hgrn+mlp"
    config.model.hgrn = HGRN.defaults()
    config.model.mlp = MLP.defaults(hidden=136)
    return finish(config, "hgrn", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Width of the state and learning rate. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    for hidden in (64, 256):
        add({"model.hgrn.hidden": hidden})
    for factor in (0.3, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})
