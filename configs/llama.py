"""Llama 2 (Touvron et al. 2023, arXiv 2307.09288) and 3 (Grattafiori et al. 2024, arXiv 2407.21783), and SmolLM2.

Command:   python train.py --config=configs/llama.py --workdir=runs/llama
Hardware:  2 CPU cores. `:2-7b` and `:3-8b` 8 GPUs of 80 GB, `:2-70b` 64, `:3.1-405b` 512 (planned, never run)
Expected:  validation 2.370, test 2.386 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)
Cost:      8 minutes of training on one CPU core (small)

Presets: small (no argument); 2-7b, 2-13b, 2-70b with 6,738,415,616, 13,015,864,320 and 68,976,648,192 parameters; 3-8b,
3-70b and 3.1-8b, 3.1-70b with 8,030,261,248 and 70,553,706,496; 3.1-405b with 405,853,388,800; 3.2-1b and 3.2-3b with
1,235,814,400 and 3,212,749,824; smollm2-135m with 134,515,008. Sizes are those of the published models. The training
is Llama 2's: 4 M tokens a step, AdamW, a cosine to a tenth after 2000 steps. The papers give the learning rates but
for 3.2 and SmolLM2, where they are ours.
`python convert.py --from=DIR --workdir=RUN` imports the published weights (docs/interop.md).
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.mlp import MLP

# name: (width, layers, heads, key heads, inner width of the MLP, vocabulary, base of rotary positions, factor by which
# they are stretched, tied embeddings, tokens of a row, peak learning rate, mesh.fsdp)
PUBLISHED = {
    "2-7b": (4096, 32, 32, 32, 11008, 32000, 1e4, 0.0, False, 4096, 3e-4, 8),
    "2-13b": (5120, 40, 40, 40, 13824, 32000, 1e4, 0.0, False, 4096, 3e-4, 16),
    "2-70b": (8192, 80, 64, 8, 28672, 32000, 1e4, 0.0, False, 4096, 1.5e-4, 64),
    "3-8b": (4096, 32, 32, 8, 14336, 128256, 5e5, 0.0, False, 8192, 3e-4, 8),
    "3-70b": (8192, 80, 64, 8, 28672, 128256, 5e5, 0.0, False, 8192, 1.5e-4, 64),
    "3.1-8b": (4096, 32, 32, 8, 14336, 128256, 5e5, 8.0, False, 8192, 3e-4, 8),
    "3.1-70b": (8192, 80, 64, 8, 28672, 128256, 5e5, 8.0, False, 8192, 1.5e-4, 64),
    "3.1-405b": (16384, 126, 128, 8, 53248, 128256, 5e5, 8.0, False, 8192, 8e-5, 512),
    "3.2-1b": (2048, 16, 32, 8, 8192, 128256, 5e5, 32.0, True, 8192, 3e-4, 8),
    "3.2-3b": (3072, 28, 24, 8, 8192, 128256, 5e5, 32.0, True, 8192, 3e-4, 8),
    "smollm2-135m": (576, 30, 9, 3, 1536, 49152, 1e5, 0.0, True, 8192, 3e-3, 1),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", *PUBLISHED])
    config = base()
    config.model.pattern = "attention+mlp"
    config.model.tie_embeddings = False
    config.model.attention = ATTENTION.defaults(heads=4, kv_heads=4)
    config.model.mlp = MLP.defaults(hidden=112)
    if chosen != "small":
        width, layers, heads, kv_heads, hidden, vocab_size, theta, stretch, tied, tokens, rate, fsdp = PUBLISHED[chosen]
        large(config, learning_rate=rate, steps=500_000, remat="block")
        config.batch_size, config.seq_len = 2**22 // tokens, tokens
        config.optimizer.warmup, config.optimizer.floor = 2000.0, 0.1
        config.training.accumulate = config.batch_size // fsdp  # 1 row a device at once
        config.mesh.fsdp = fsdp
        config.model.width, config.model.repeats, config.model.vocab_size = width, layers, vocab_size
        config.model.tie_embeddings = tied
        config.model.attention.update(heads=heads, kv_heads=kv_heads, rope_theta=theta)
        if stretch:
            config.model.attention.update(scaling="llama3", scaling_factor=stretch, trained_length=8192)
        config.model.mlp.hidden = hidden
        config.model.scan_blocks = 1
    return finish(config, "llama", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Sharing of keys and values, base of the rotary positions, and learning rate."""
    config = get_config(arg)
    attention = config.model.attention
    for kv_heads in (1, attention.heads):
        if kv_heads != attention.kv_heads:
            add({"model.attention.kv_heads": kv_heads})
    for factor in (0.1, 10.0):
        add({"model.attention.rope_theta": attention.rope_theta * factor})
    add({"optimizer.learning_rate": config.optimizer.learning_rate / 3})
