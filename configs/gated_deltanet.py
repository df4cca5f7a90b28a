"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2025, arXiv 2412.06464): the delta rule on a state that decays.

Command:   python train.py --config=configs/gated_deltanet.py --workdir=runs/gated_deltanet
Hardware:  2 CPU cores. `:340m` one GPU of 80 GB, `:1.3b` eight of them (with training.accumulate=4).
Expected:  validation 2.130, test 2.156 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)
Cost:      10 minutes of training on one CPU core (small)

Presets: small (no argument), 340m (15 B tokens), and the paper's size 1.3b (100 B tokens). A layer's mixer has 6 D^2
parameters: queries and keys of 3/4 D, values, gate and output of 3/2 D.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset
from seqmodels.fields.gated_deltanet import GATED_DELTANET
from seqmodels.fields.mlp import MLP

# name: (width, layers, heads, steps, rows a step, remat); heads have 256 channels of keys, as in the authors' configs
PAPER = {
    "340m": (1024, 21, 3, 28_600, 256, "none"),
    "1.3b": (2048, 21, 6, 47_700, 1024, "block"),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", *PAPER])
    config = base()
    config.model.pattern = "gated_deltanet+mlp"
    config.model.gated_deltanet = GATED_DELTANET.defaults(heads=4)
    config.model.mlp = MLP.defaults(hidden=48)
    if chosen != "small":
        width, layers, heads, steps, rows, remat = PAPER[chosen]
        large(config, learning_rate=4e-4, steps=steps, remat=remat)
        config.batch_size, config.training.accumulate = rows, rows // 8
        config.model.width, config.model.repeats, config.model.gated_deltanet.heads = width, layers, heads
        config.model.mlp.hidden = 256 * -(-8 * width // (3 * 256))  # as the authors round
        config.model.vocab_size = 32_000
        config.model.scan_blocks = 1
        config.optimizer.update(dict(weight_decay=0.1, floor=0.1))
    return finish(config, "gated_deltanet", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Heads, shared keys, negative eigenvalues and learning rate. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    heads, keys = config.model.gated_deltanet.heads, 3 * config.model.width // 4
    for count in (heads // 2, 2 * heads):
        if count and keys % count == 0:
            add({"model.gated_deltanet.heads": count})
    if heads % 2 == 0:  # two heads of values to one of keys, in a state of the same size
        add({"model.gated_deltanet.key_heads": heads // 2})
    add({"model.gated_deltanet.negative_eigenvalues": True})
    for factor in (0.3, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})
