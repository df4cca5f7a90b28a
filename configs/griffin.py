"""Griffin (De et al. 2024, arXiv 2402.19427): two recurrent blocks with RG-LRU to one of local attention.

Command:   python train.py --config=configs/griffin.py --workdir=runs/griffin
Hardware:  2 CPU cores. `:2b` one GPU of 80 GB (planned, never run).
Expected:  validation 2.100, test 2.126 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)
Cost:      9 minutes of training on one CPU core (small)

Presets: small (no argument), hawk (recurrent blocks only, as small) and 2b, which has the layers of RecurrentGemma-2B.
2b differs from it in that logits have no limit and the embedding no scale. small and hawk have as many parameters as
that of configs/densemamba.py, within 2 %.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.mlp import MLP
from seqmodels.fields.rglru import RGLRU


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", "hawk", "2b"])
    config = base()
    config.model.pattern = "rglru+mlp x2 attention+mlp"
    config.model.repeats = 2
    config.model.norm_eps = 1e-6
    config.model.rglru = RGLRU.defaults()
    config.model.attention = ATTENTION.defaults(heads=4, kv_heads=1, window=64, rotary=0.5)
    config.model.mlp = MLP.defaults(hidden=68, activation="gelu")
    if chosen == "hawk":
        config.model.pattern, config.model.repeats = "rglru+mlp", 4
        config.model.mlp.hidden = 152
    elif chosen == "2b":
        large(config, learning_rate=2e-4, steps=100_000, remat="block")
        config.model.pattern, config.model.repeats = "(rglru+mlp) x26 attention@2/3", 1
        config.model.width = 2560
        config.model.vocab_size = 256_000
        config.model.rglru.heads = config.model.attention.heads = 10
        config.model.attention.window = 2048
        config.model.mlp.hidden = 3 * 2560
    return finish(config, "griffin", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Heads of the gates, the window and learning rate. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    for heads in (1, 2):
        add({"model.rglru.heads": heads})
    add({"model.attention.window": 2 * config.model.attention.window})
    for factor in (0.3, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})
