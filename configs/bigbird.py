"""BigBird (Zaheer et al. 2020, arXiv 2007.14062): a token sees the newest blocks, the first ones, and random ones.

Command:   python train.py --config=configs/bigbird.py --workdir=runs/bigbird
Hardware:  2 CPU cores. `:base` one GPU of 80 GB (planned, never run)
Expected:  validation 2.365, test 2.375 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)
Cost:      8 minutes of training on one CPU core (small)

Presets: small (no argument), the Transformer of configs/transformer.py with blocks of 16 tokens; and base, with the
width, layers, heads, blocks and rows of the published base model. That one is an encoder with learned positions; these
predict the next token, so they see earlier blocks only, and have rotary positions.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.mlp import MLP


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", "base"])
    config = base()
    config.model.pattern = "attention+mlp"
    config.model.attention = ATTENTION.defaults(
        heads=4, kv_heads=2, mask="bigbird", block=16, near=3, first=1, random=1
    )
    config.model.mlp = MLP.defaults(hidden=176)
    if chosen == "base":
        large(config, learning_rate=6e-4, steps=4800, remat="none")
        config.batch_size, config.seq_len = 128, 4096
        config.model.width, config.model.repeats, config.model.scan_blocks = 768, 12, 1
        config.model.vocab_size = 50358
        config.model.attention.update(heads=12, kv_heads=12, block=64, random=3)
        config.model.mlp.update(hidden=3072, activation="gelu", gated=False)
    return finish(config, "bigbird", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """All tokens, and each part of the pattern left out. Each trial is a dict of dotted fields."""
    add({"model.attention.mask": "causal"})
    add({"model.attention.random": 0})
    add({"model.attention.first": 0})
    add({"model.attention.near": 1})
