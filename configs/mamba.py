"""Mamba (Gu and Dao 2023, arXiv 2312.00752): selective state spaces, no attention and no MLP.

Command:   python train.py --config=configs/mamba.py --workdir=runs/mamba
Hardware:  2 CPU cores. `:130m` one GPU of 80 GB, `:2.8b` eight of them (with training.accumulate=4).
Expected:  validation 2.071, test 2.098 bits per byte (small; docs/results/small/report.md; xz -9: 2.591, 2.543)
Cost:      4 minutes of training on 2 CPU cores (small)

Presets: small (no argument), and the paper's 130m, 370m, 790m, 1.4b, 2.8b with 129,135,360, 371,516,416, 793,204,224,
1,372,178,432 and 2,768,345,600 parameters. The small preset has 99 % of the parameters of configs/densemamba.py.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset
from seqmodels.fields.mamba import MAMBA

# name: (width, layers, peak learning rate, steps, remat, scan_blocks). Steps are those of the paper's scaling runs (2.5
# to 26 B tokens). 2.8b is not among these runs. It has the 300 B tokens of the released models, and five times the
# learning rate of GPT-3's 2.7B.
PAPER = {
    "130m": (768, 24, 3e-3, 4800, "none", 0),
    "370m": (1024, 48, 1.5e-3, 13500, "rescan", 0),
    "790m": (1536, 48, 1.25e-3, 29000, "mixer", 0),
    "1.4b": (2048, 48, 1e-3, 50000, "rescan", 0),
    "2.8b": (2560, 64, 8e-4, 572000, "block", 1),
}


def add_mamba(config: ConfigDict) -> None:
    """Fields of the Mamba mixer (seqmodels/mixers/mamba.py), with the paper's values."""
    config.model.mamba = MAMBA.defaults()


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", *PAPER])
    config = base()
    config.model.pattern = "mamba"
    add_mamba(config)
    if chosen != "small":
        width, layers, learning_rate, steps, remat, scan_blocks = PAPER[chosen]
        large(config, learning_rate=learning_rate, steps=steps, remat=remat)
        config.model.width, config.model.repeats = width, layers
        config.model.scan_blocks = scan_blocks  # unrolled (0) is faster and smaller, but slow to compile
    return finish(config, "mamba", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """State size, step-size norms and learning rate. Each trial is a dict of dotted fields."""
    learning_rate = get_config(arg).optimizer.learning_rate
    for state in (1, 4, 16, 64):
        add({"model.mamba.state": state})
    for norms in ("rms", "learned"):
        add({"model.mamba.norms": norms})
    for factor in (0.3, 3.0):
        add({"optimizer.learning_rate": learning_rate * factor})
