"""Mistral 7B (Jiang et al. 2023, arXiv 2310.06825): a Llama with grouped queries and a sliding window.

Command:   python train.py --config=configs/mistral.py --workdir=runs/mistral
Hardware:  2 CPU cores. `:7b-v0.1` and `:7b-v0.3` 8 GPUs of 80 GB (planned, never run)
Expected:  validation 2.310, test 2.332 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)
Cost:      8 minutes of training on one CPU core (small)

Presets: small (no argument), 7b-v0.1 with 7,241,732,096 parameters and a window of 4096 tokens, 7b-v0.3 with
7,248,023,552 and none. Sizes are those of the published models. How these were trained is not public: the training is
that of configs/llama.py. With a window the state has a constant size, so a text may be of any length.
`python convert.py --from=DIR --workdir=RUN` imports the published weights (docs/interop.md).
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.mlp import MLP

# name: (vocabulary, base of rotary positions, window)
PUBLISHED = {"7b-v0.1": (32000, 1e4, 4096), "7b-v0.3": (32768, 1e6, 0)}


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", *PUBLISHED])
    config = base()
    config.model.pattern = "attention+mlp"
    config.model.tie_embeddings = False
    config.model.attention = ATTENTION.defaults(heads=4, kv_heads=2, window=64)
    config.model.mlp = MLP.defaults(hidden=156)
    if chosen != "small":
        vocab_size, theta, window = PUBLISHED[chosen]
        large(config, learning_rate=3e-4, steps=500_000, remat="block")
        config.batch_size, config.seq_len = 512, 8192
        config.optimizer.warmup, config.optimizer.floor = 2000.0, 0.1
        config.mesh.fsdp, config.training.accumulate = 8, 64  # 1 row a device at once
        config.model.width, config.model.repeats, config.model.vocab_size = 4096, 32, vocab_size
        config.model.attention.update(heads=32, kv_heads=8, rope_theta=theta, window=window)
        config.model.mlp.hidden = 14336
        config.model.scan_blocks = 1
    return finish(config, "mistral", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """The window, none (0) among them, and the sharing of keys and values."""
    attention = get_config(arg).model.attention
    for window in (0, 16, 32, 128):
        if window != attention.window:
            add({"model.attention.window": window})
    for kv_heads in (1, attention.heads):
        add({"model.attention.kv_heads": kv_heads})
