"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): structured state space duality, no attention and no MLP.

Command:   python train.py --config=configs/mamba2.py --workdir=runs/mamba2
Hardware:  2 CPU cores. `:130m` one GPU of 80 GB, `:2.7b` eight of them (with training.accumulate=4).
Expected:  validation 2.079, test 2.111 bits per byte (small; docs/results/small/report.md; xz -9: 2.591, 2.543)
Cost:      5 minutes of training on 2 CPU cores (small)

Presets: small (no argument), and the paper's 130m, 370m, 780m, 1.3b, 2.7b with 128,989,632, 368,346,624, 780,161,280,
1,343,757,312 and 2,702,599,680 parameters.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset
from seqmodels.fields.mamba2 import MAMBA2

# name: (width, layers, peak learning rate, steps, remat, scan_blocks), trained like configs/mamba.py's
PAPER = {
    "130m": (768, 24, 3e-3, 4800, "none", 0),
    "370m": (1024, 48, 1.5e-3, 13500, "rescan", 0),
    "780m": (1536, 48, 1.25e-3, 29000, "mixer", 0),
    "1.3b": (2048, 48, 1e-3, 50000, "mixer", 0),
    "2.7b": (2560, 64, 8e-4, 572000, "block", 1),
}


def add_mamba2(config: ConfigDict) -> None:
    """Fields of the Mamba-2 mixer (seqmodels/mixers/mamba2.py), with the paper's values."""
    config.model.mamba2 = MAMBA2.defaults(state=128, head_dim=64)


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", *PAPER])
    config = base()
    config.model.pattern = "mamba2"
    add_mamba2(config)
    if chosen == "small":
        config.model.mamba2.update(dict(state=64, head_dim=32))
    else:
        width, layers, learning_rate, steps, remat, scan_blocks = PAPER[chosen]
        large(config, learning_rate=learning_rate, steps=steps, remat=remat)
        config.model.width, config.model.repeats = width, layers
        config.model.vocab_size = 50288  # of the released models: a multiple of 16
        config.model.scan_blocks = scan_blocks
    return finish(config, "mamba2", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """State size, width of a head, dense links and learning rate. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    for state in (16, 64, 128, 256):
        if state != config.model.mamba2.state:
            add({"model.mamba2.state": state})
    for head_dim in (16, 64, 128):
        if head_dim != config.model.mamba2.head_dim:
            add({"model.mamba2.head_dim": head_dim})
    for variant in ("read", "rank", "input"):
        add({"model.dense.variant": variant})
    for factor in (0.3, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})
