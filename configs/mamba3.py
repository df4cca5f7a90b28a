"""Mamba-3 (ICLR 2026, arXiv 2603.15569), SISO: trapezoidal steps and rotating states, and an MLP after each mixer.

Command:   python train.py --config=configs/mamba3.py --workdir=runs/mamba3
Hardware:  2 CPU cores. `:130m` one GPU of 80 GB, `:1.3b` eight of them (with training.accumulate=4).
Expected:  validation 2.130, test 2.167 bits per byte (small; docs/results/small/report.md; xz -9: 2.591, 2.543)
Cost:      4 minutes of training on 2 CPU cores (small)

Presets: small (no argument); 130m, 370m, 780m, 1.3b with Mamba-2's widths, half its number of blocks, and an MLP after
each block. The paper alternates mixers and MLPs too; its own sizes (180M to 1.5B) were not available.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset
from seqmodels.configs.mamba2 import PAPER
from seqmodels.fields.mamba3 import MAMBA3
from seqmodels.fields.mlp import MLP

SIZES = ("130m", "370m", "780m", "1.3b")


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", *SIZES])
    config = base()
    config.model.pattern = "mamba3+mlp"
    config.model.mamba3 = MAMBA3.defaults(state=128, head_dim=64)
    config.model.mlp = MLP.defaults(hidden=120)
    if chosen == "small":
        config.model.repeats = 3
        config.model.mamba3.update(dict(state=32, head_dim=32))
    else:
        width, layers, learning_rate, steps, remat, _ = PAPER[chosen]
        large(config, learning_rate=learning_rate, steps=steps, remat=remat)
        config.model.width, config.model.repeats = width, layers // 2
        config.model.mlp.hidden = 2 * width
        config.model.scan_blocks = 1
    return finish(config, "mamba3", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Rotation, decays and learning rate. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    add({"model.mamba3.rotated": 1.0})
    add({"model.mamba3.A_activation": "softplus"})
    for factor in (0.3, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})
