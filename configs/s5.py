"""S5 (Smith et al. 2023, arXiv 2208.04933): one state space model for all channels, with a diagonal complex state.

Command:   python train.py --config=configs/s5.py --workdir=runs/s5
           python train.py --config=configs/s5.py:digits --workdir=runs/s5-digits
Hardware:  2 CPU cores.
Expected:  digits: accuracy 0.964 on the last 360 images, 0.993 in validation; at half the sampling rate, behind a low
           pass, 0.964 and 0.979 (seed 0; 2026-12-01, docs/domains.md)
Cost:      digits: 116 to 120 CPU seconds with compilation and evaluation

Presets: small (no argument), which has as many parameters as that of configs/densemamba.py within 2 %, and digits,
which names the digit that 64 pixels in a row show (scikit-learn's 8 x 8 images). digits has the authors' layers, which
are S5 in both directions without an MLP, but for the norm: RMSNorm in place of BatchNorm. In training images are warped
a little, and about half of them are read at half the sampling rate (data.half_rate). Eigenvalues, steps and B of digits
have a quarter of the learning rate (docs/training.md).
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs import domains
from seqmodels.configs.base import base, finish, preset
from seqmodels.fields.mlp import MLP
from seqmodels.fields.s5 import S5


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", "digits"])
    config = base()
    if chosen == "digits":
        config.model.pattern, config.model.repeats, config.model.width = "bi:s5", 2, 64
        config.model.s5 = S5.defaults(state=64, blocks=4, dt_min=0.01, dt_max=1.0)  # rows are short
        config.model.bias = True
        domains.read(config, "digits", domains.USUAL | domains.SIZES["digits"] | dict(steps=3000), {})
        config.data.half_rate = 0.5
        config.optimizer.groups = "ssm=0.25"
    else:
        config.model.pattern = "s5+mlp"
        config.model.s5 = S5.defaults(state=192, blocks=4)
        config.model.mlp = MLP.defaults(hidden=136)
    return finish(config, "s5", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Size of the state, its blocks, and learning rates. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    for factor in (0.5, 2):
        add({"model.s5.state": int(config.model.s5.state * factor)})
    for blocks in (1, 16):
        add({"model.s5.blocks": blocks})
    for factor in (0.3, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})
