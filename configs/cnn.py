"""Dilated causal convolutions with gates, after WaveNet (van den Oord et al. 2016, arXiv 1609.03499). A baseline.

Command:   python train.py --config=configs/cnn.py --workdir=runs/cnn
Hardware:  2 CPU cores.
Expected:  validation 2.289, test 2.313 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)
Cost:      4 minutes of training on one CPU core (small)

Preset: small (no argument). It has the same number of parameters as that of configs/densemamba.py, within
2 %. A token sees itself and the 124 tokens before it.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, preset
from seqmodels.fields.cnn import CNN


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small"])
    config = base()
    config.model.pattern = "cnn"
    config.model.width, config.model.repeats = 124, 2
    config.model.cnn = CNN.defaults(dilations=(1, 2, 4, 8, 16))
    return finish(config, "cnn", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Reach of the convolutions and learning rate. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    for dilations in ((1, 2, 4, 8, 1), (1, 3, 9, 27, 81)):
        add({"model.cnn.dilations": dilations})
    for factor in (0.3, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})
