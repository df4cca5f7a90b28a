"""LSTM (Hochreiter and Schmidhuber 1997) with the gates of torch.nn.LSTM, in residual blocks. A baseline.

Command:   python train.py --config=configs/lstm.py --workdir=runs/lstm
Hardware:  2 CPU cores.
Expected:  validation 2.186, test 2.208 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)
Cost:      5 minutes of training on one CPU core (small)

Preset: small (no argument). It has the same number of parameters as that of configs/densemamba.py, within 2 %. The
recurrence is not linear in its state, so the tokens are computed one after the other in training too.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, preset
from seqmodels.fields.lstm import LSTM


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small"])
    config = base()
    config.model.pattern = "lstm"
    config.model.repeats = 2
    config.model.lstm = LSTM.defaults(hidden=176)
    return finish(config, "lstm", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Width of the state, forget bias and learning rate. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    for hidden in (128, 256):
        add({"model.lstm.hidden": hidden})
    add({"model.lstm.forget_bias": 0.0})
    for factor in (0.3, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})
