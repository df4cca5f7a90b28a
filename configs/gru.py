"""GRU (Cho et al. 2014, arXiv 1406.1078) with the gates of torch.nn.GRU, in residual blocks. A baseline.

Command:   python train.py --config=configs/gru.py --workdir=runs/gru
Hardware:  2 CPU cores.
Expected:  validation 2.134, test 2.164 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)
Cost:      5 minutes of training on one CPU core (small)

Preset: small (no argument). It has the same number of parameters as that of configs/densemamba.py, within 2 %. The
recurrence is not linear in its state, so the tokens are computed one after the other in training too.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, preset
from seqmodels.fields.gru import GRU


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small"])
    config = base()
    config.model.pattern = "gru"
    config.model.repeats = 2
    config.model.gru = GRU.defaults(hidden=208)
    return finish(config, "gru", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Width of the state and learning rate. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    for hidden in (128, 256):
        add({"model.gru.hidden": hidden})
    for factor in (0.3, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})
