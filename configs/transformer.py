"""Transformer++ (Touvron et al. 2023): RMSNorm, rotary positions, grouped queries, SwiGLU, no bias. The baseline.

Command:   python train.py --config=configs/transformer.py --workdir=runs/transformer
Hardware:  2 CPU cores. `:130m` and `:350m` one GPU of 80 GB, `:1.4b` eight of them (with training.accumulate=4).
Expected:  validation 2.314, test 2.337 bits per byte (small; docs/results/small/report.md; xz -9: 2.591, 2.543)
Cost:      2 1/2 minutes of training on 2 CPU cores (small)

Presets: small (no argument), 130m, 350m, 1.4b. Each has the same number of parameters as that preset of
configs/densemamba.py, within 2 %: one layer corresponds to two of Mamba's, and its MLP has three times the width.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.mlp import MLP

# name: (width, layers, heads, peak learning rate, steps, remat); GPT-3's shapes, trained as in the Mamba paper
PAPER = {
    "130m": (768, 12, 12, 3e-3, 4800, "none"),
    "350m": (1024, 24, 16, 1.5e-3, 13500, "none"),
    "1.4b": (2048, 24, 32, 1e-3, 50000, "block"),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", *PAPER])
    config = base()
    config.model.pattern = "attention+mlp"
    config.model.attention = ATTENTION.defaults(heads=4, kv_heads=2)
    config.model.mlp = MLP.defaults(hidden=176)
    if chosen != "small":
        width, layers, heads, learning_rate, steps, remat = PAPER[chosen]
        large(config, learning_rate=learning_rate, steps=steps, remat=remat)
        config.model.width, config.model.repeats = width, layers
        config.model.attention.heads = config.model.attention.kv_heads = heads
        config.model.mlp.hidden = 3 * width
        config.model.scan_blocks = 1
    return finish(config, "transformer", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Sharing of keys and values, and learning rate. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    heads = config.model.attention.heads
    for kv_heads in sorted({1, heads // 2, heads}):
        add({"model.attention.kv_heads": kv_heads})
    for factor in (0.3, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})
