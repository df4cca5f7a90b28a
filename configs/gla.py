"""Gated linear attention (Yang et al. 2024, arXiv 2312.06635): the token sets the decay of each row of the state.

Command:   python train.py --config=configs/gla.py --workdir=runs/gla
Hardware:  2 CPU cores. `:340m` one GPU of 80 GB, `:1.3b` eight of them (with training.accumulate=4).
Expected:  validation 2.295, test 2.314 bits per byte (small; docs/results/small/report.md; xz -9: 2.591, 2.543)
Cost:      3 minutes of training on 2 CPU cores (small)

Presets: small (no argument), and the paper's sizes 340m (15 B tokens) and 1.3b (100 B tokens).
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset
from seqmodels.fields.gla import GLA
from seqmodels.fields.mlp import MLP

# name: (width, layers, heads, steps, rows a step, remat); section 5
PAPER = {
    "340m": (1024, 24, 4, 28_600, 256, "none"),
    "1.3b": (2048, 24, 4, 47_700, 1024, "block"),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", *PAPER])
    config = base()
    config.model.pattern = "gla+mlp"
    config.model.gla = GLA.defaults(heads=4)
    config.model.mlp = MLP.defaults(hidden=128)
    if chosen != "small":
        width, layers, heads, steps, rows, remat = PAPER[chosen]
        large(config, learning_rate=3e-4, steps=steps, remat=remat)
        config.batch_size, config.training.accumulate = rows, rows // 8
        config.model.width, config.model.repeats, config.model.gla.heads = width, layers, heads
        config.model.mlp.hidden = 0
        config.model.vocab_size = 32_000
        config.model.scan_blocks = 1
        config.optimizer.update(dict(weight_decay=0.01, floor=0.1))
    return finish(config, "gla", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Heads, the decays' range and learning rate. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    for heads in (1, 2, 8):
        add({"model.gla.heads": heads})
    add({"model.gla.gate_divisor": 1.0})
    for factor in (0.3, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})
