"""RWKV-4 (Peng et al. 2023, arXiv 2305.13048): averages over the past with decaying weights, and a channel mix.

Command:   python train.py --config=configs/rwkv.py --workdir=runs/rwkv
Hardware:  2 CPU cores. `:169m` one GPU of 80 GB, `:14b` eight or more (planned, never run).
Expected:  validation 2.054, test 2.091 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)
Cost:      7 minutes of training on one CPU core (small)

Presets: small (no argument), and the published sizes 169m, 430m, 1.5b, 3b, 7b and 14b. Their models have one more norm,
behind the embedding, which can be folded into its table when a model is trained. They have the training of the Mamba
paper at GPT-3's rates, with rows of 1024 tokens. All blocks are unrolled (model.scan_blocks=0), as a fresh block
depends on its place in the stack.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset
from seqmodels.fields.rwkv import RWKV
from seqmodels.fields.rwkv_channel import RWKV_CHANNEL

# name: (width, layers, peak learning rate); the paper's table 2, and its section 4.2 for the rates
PUBLISHED = {
    "169m": (768, 12, 6e-4),
    "430m": (1024, 24, 4e-4),
    "1.5b": (2048, 24, 3e-4),
    "3b": (2560, 32, 1.5e-4),
    "7b": (4096, 32, 1.5e-4),
    "14b": (5120, 40, 1e-4),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", *PUBLISHED])
    config = base()
    config.model.pattern = "rwkv+rwkv_channel"
    config.model.norm, config.model.bias = "layer", True
    config.model.rwkv = RWKV.defaults()
    config.model.rwkv_channel = RWKV_CHANNEL.defaults(hidden=140)
    if chosen != "small":
        width, layers, learning_rate = PUBLISHED[chosen]
        large(config, learning_rate=learning_rate, steps=100_000, remat="block")
        config.seq_len = 1024
        config.model.width, config.model.repeats = width, layers
        config.model.tie_embeddings = False
        config.model.vocab_size = 50277
        config.model.rwkv_channel.hidden = 0
    return finish(config, "rwkv", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Channels of the average, the channel mix, and learning rate. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    add({"model.rwkv.hidden": 2 * config.model.width})
    add({"model.pattern": "rwkv+mlp"})
    for factor in (0.3, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})
