"""Jamba (Lieber et al. 2024, arXiv 2403.19887; 2408.12570): one attention to seven Mambas, experts every second layer.

Command:   python train.py --config=configs/jamba.py --workdir=runs/jamba
Hardware:  2 CPU cores. `:tiny-dev` one GPU of 80 GB; `:v0.1`, `:1.5-mini` 16, `:1.5-large` 128 (planned, never run)
Expected:  validation 2.071, test 2.114 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)
Cost:      10 minutes of training on 2 CPU cores (small)

Presets: small (no argument), tiny-dev, v0.1, 1.5-mini, 1.5-large with 318,688,640, 51,570,323,328 (twice) and
398,555,145,696 parameters, of which a token uses 167,693,696, 12,110,311,296 and 94,149,338,592. Sizes and layout are
those of the published models. How these were trained is not public: the training is that of the Mamba paper at GPT-3's
rates.
Attention has no positions: the Mambas before it know the order. `python train.py --config=configs/jamba.py:1.5-large
--plan --context=262144` says what a preset needs (docs/plan.md).
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.mamba import MAMBA
from seqmodels.fields.mlp import MLP
from seqmodels.fields.moe import MOE

PATTERN = "(mamba+mlp) x8 attention@4/8 +moe@1/2"

# name: (width, groups of 8 layers, heads, key heads, inner width of MLP and experts, experts, peak learning rate,
# mesh.fsdp, mesh.expert). tiny-dev's number of heads is a guess: only the width of its keys follows from its size.
PUBLISHED = {
    "tiny-dev": (512, 2, 8, 2, 2048, 8, 6e-4, 1, 1),
    "v0.1": (4096, 4, 32, 8, 14336, 16, 1.2e-4, 8, 2),
    "1.5-mini": (4096, 4, 32, 8, 14336, 16, 1.2e-4, 8, 2),
    "1.5-large": (8192, 9, 64, 8, 24576, 16, 6e-5, 32, 4),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", *PUBLISHED])
    config = base()
    config.model.pattern = PATTERN
    config.model.norm_eps = 1e-6
    config.model.tie_embeddings = False
    config.model.mamba = MAMBA.defaults(norms="learned", norm_eps=1e-6)
    config.model.attention = ATTENTION.defaults(heads=4, kv_heads=2, positions="none")
    config.model.mlp = MLP.defaults(hidden=60)
    config.model.moe = MOE.defaults(experts=4, top_k=2, hidden=60, router="softmax", balance=1e-3)
    if chosen == "small":
        config.model.width, config.model.repeats = 64, 1
    else:
        width, groups, heads, kv_heads, hidden, experts, learning_rate, fsdp, expert = PUBLISHED[chosen]
        large(config, learning_rate=learning_rate, steps=100_000, remat="block")
        config.model.width, config.model.repeats = width, groups
        config.model.vocab_size = 65536
        config.model.attention.heads, config.model.attention.kv_heads = heads, kv_heads
        config.model.mlp.hidden = config.model.moe.hidden = hidden
        config.model.moe.experts = experts
        config.model.scan_blocks = 1
        config.mesh.fsdp, config.mesh.expert = fsdp, expert
        config.training.accumulate = 32 if expert == 1 else max(1, 128 // (fsdp * expert))  # 8 rows, or 2 a device
    return finish(config, "jamba", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """The paper's ablations: ratio of attention to Mamba, experts, inner norms, and positions."""
    for pattern in ("(mamba+mlp) x8 attention@2/4 +moe@1/2", "mamba+mlp x8", "attention+mlp x8"):
        add({"model.pattern": pattern})
    add({"model.pattern": "(mamba+mlp) x8 attention@4/8"})
    for norms in ("none", "rms"):
        add({"model.mamba.norms": norms})
    add({"model.attention.positions": "rope"})
    add({"model.moe.router": "renormalised"})
