"""Samba (Ren et al. 2024, arXiv 2406.07522): Mamba and attention with a window in turns, an MLP after each.

Command:   python train.py --config=configs/samba.py --workdir=runs/samba
Hardware:  2 CPU cores. `:421m` one GPU of 80 GB, `:1.3b` eight (planned, never run)
Expected:  validation 2.118, test 2.150 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)
Cost:      10 minutes of training on one CPU core (small)

Presets: small (no argument); 421m and 1.3b with the sizes of the authors' code, 421,793,280 and 1,330,207,488
parameters, windows of 2048 tokens and rows of 4096. The training is that of the Mamba paper at GPT-3's rates. The state
has a constant size, so a text may be of any length.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.mamba import MAMBA
from seqmodels.fields.mlp import MLP

# name: (width, groups of two layers, heads, inner width of the MLP, peak learning rate, mesh.fsdp)
PUBLISHED = {"421m": (1536, 6, 12, 4096, 3e-4, 1), "1.3b": (2304, 9, 18, 6144, 2e-4, 8)}


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", *PUBLISHED])
    config = base()
    config.model.pattern = "mamba+mlp attention+mlp"
    config.model.repeats = 2
    config.model.mamba = MAMBA.defaults()
    config.model.attention = ATTENTION.defaults(heads=4, kv_heads=2, window=64)
    config.model.mlp = MLP.defaults(hidden=90)
    if chosen != "small":
        width, groups, heads, hidden, learning_rate, fsdp = PUBLISHED[chosen]
        large(config, learning_rate=learning_rate, steps=40_000, remat="block")
        config.batch_size, config.seq_len = 128, 4096
        config.mesh.fsdp = fsdp
        config.model.width, config.model.repeats, config.model.vocab_size = width, groups, 32000
        config.model.attention.update(heads=heads, kv_heads=heads, window=2048)
        config.model.mlp.hidden = hidden
        config.model.scan_blocks = 1
    return finish(config, "samba", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Only one of the two mixers, attention that sees the whole text, other windows, and no positions."""
    window = get_config(arg).model.attention.window
    for pattern in ("mamba+mlp x2", "attention+mlp x2"):
        add({"model.pattern": pattern})
    for other in (0, window // 2):
        add({"model.attention.window": other})
    add({"model.attention.positions": "none"})
