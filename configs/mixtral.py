"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): a Transformer with a mixture of experts in place of every MLP.

Command:   python train.py --config=configs/mixtral.py --workdir=runs/mixtral
Hardware:  2 CPU cores. `:8x7b` 16 GPUs of 80 GB or more, `:8x22b` 64 (planned, never run)
Expected:  validation 2.403, test 2.425 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)
Cost:      6 minutes of training on 2 CPU cores (small)

Presets: small (no argument), 8x7b, 8x22b with 46,702,792,704 and 140,630,071,296 parameters, of which a token uses
12,879,925,248 and 39,161,468,928. Sizes are those of the published models; how these were trained is not public, so
the training is that of the Mamba paper at GPT-3's rates. The weights of a token's two experts add up to 1.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.moe import MOE

# name: (width, layers, heads, inner width of an expert, vocabulary, peak learning rate, mesh.fsdp, mesh.expert)
PUBLISHED = {
    "8x7b": (4096, 32, 32, 14336, 32000, 1.2e-4, 8, 2),
    "8x22b": (6144, 56, 48, 16384, 32768, 6e-5, 8, 8),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", *PUBLISHED])
    config = base()
    config.model.pattern = "attention+moe"
    config.model.tie_embeddings = False
    config.model.attention = ATTENTION.defaults(heads=4, kv_heads=2, rope_theta=1e6)
    config.model.moe = MOE.defaults(experts=4, top_k=2, hidden=64, router="renormalised")
    if chosen == "small":
        config.model.repeats = 3
    else:
        width, layers, heads, hidden, vocab_size, learning_rate, fsdp, expert = PUBLISHED[chosen]
        large(config, learning_rate=learning_rate, steps=100_000, remat="block")
        config.model.width, config.model.repeats, config.model.vocab_size = width, layers, vocab_size
        config.model.attention.heads, config.model.attention.kv_heads = heads, 8
        config.model.moe.experts, config.model.moe.hidden = 8, hidden
        config.model.scan_blocks = 1
        config.mesh.fsdp, config.mesh.expert = fsdp, expert
        config.training.accumulate = 128 // (fsdp * expert)  # 2 rows a device at once
    return finish(config, "mixtral", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Experts a token, number of experts at the same number of parameters, routers, and the balance of their load."""
    moe = get_config(arg).model.moe
    for experts in (moe.experts // 2, 2 * moe.experts):
        add({"model.moe.experts": experts, "model.moe.hidden": moe.experts * moe.hidden // experts})
    add({"model.moe.router": "softmax", "model.moe.top_k": 1})
    for router in ("softmax", "sigmoid"):
        add({"model.moe.router": router})
    for balance in (0.0, 10 * moe.balance):
        add({"model.moe.balance": balance})
