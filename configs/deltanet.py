"""DeltaNet (Yang et al. 2024, arXiv 2406.06484): each token corrects what the matrix state holds for its key.

Command:   python train.py --config=configs/deltanet.py --workdir=runs/deltanet
Hardware:  2 CPU cores. `:340m` one GPU of 80 GB, `:1.3b` eight of them (with training.accumulate=4).
Expected:  validation 2.324, test 2.346 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)
Cost:      8 minutes of training on one CPU core (small)

Presets: small (no argument), and the paper's sizes 340m (15 B tokens) and 1.3b (100 B tokens).
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset
from seqmodels.fields.deltanet import DELTANET
from seqmodels.fields.mlp import MLP

# name: (width, layers, heads, steps, rows a step, remat); section 4 and the authors' configs
PAPER = {
    "340m": (1024, 24, 8, 28_600, 256, "none"),
    "1.3b": (2048, 24, 16, 47_700, 1024, "block"),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", *PAPER])
    config = base()
    config.model.pattern = "deltanet+mlp"
    config.model.deltanet = DELTANET.defaults(heads=4)
    config.model.mlp = MLP.defaults(hidden=128)
    if chosen != "small":
        width, layers, heads, steps, rows, remat = PAPER[chosen]
        large(config, learning_rate=3e-4, steps=steps, remat=remat)
        config.batch_size, config.training.accumulate = rows, rows // 8
        config.model.width, config.model.repeats, config.model.deltanet.heads = width, layers, heads
        config.model.mlp.hidden = 256 * -(-8 * width // (3 * 256))  # as the authors round
        config.model.vocab_size = 32_000
        config.model.scan_blocks = 1
        config.optimizer.update(dict(weight_decay=0.01, floor=0.1))
    return finish(config, "deltanet", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Heads, negative eigenvalues and learning rate. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    for heads in (1, 2, 8):
        add({"model.deltanet.heads": heads})
    add({"model.deltanet.negative_eigenvalues": True})
    for factor in (0.3, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})
