"""Pythia (Biderman et al. 2023, arXiv 2304.01373): GPT-NeoX, attention and MLP side by side, layer norms, biases.

Command:   python train.py --config=configs/pythia.py --workdir=runs/pythia
Hardware:  2 CPU cores. `:70m` to `:1b` one GPU of 80 GB, `:6.9b` eight of them (planned, never run)
Expected:  validation 2.454, test 2.467 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)
Cost:      8 minutes of training on one CPU core (small)

Presets: small (no argument); 70m, 160m, 410m, 1b, 1.4b, 2.8b, 6.9b, 12b with 70,426,624, 162,322,944, 405,334,016,
1,011,781,632, 1,414,647,808, 2,775,208,960, 6,857,302,016 and 11,846,072,320 parameters. Sizes and training are those
of the published models: 2 M tokens a step, 143,000 steps, Adam, a cosine to a tenth after 1 % of the steps. Rotary
positions turn a quarter of the channels of a head. The tokenizer is that of GPT-NeoX.
`python convert.py --from=DIR --workdir=RUN` imports the published weights (docs/interop.md).
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.mlp import MLP

# name: (width, layers, heads, vocabulary, peak learning rate, micro-batches, mesh.fsdp)
PUBLISHED = {
    "70m": (512, 6, 8, 50304, 1e-3, 64, 1),
    "160m": (768, 12, 12, 50304, 6e-4, 64, 1),
    "410m": (1024, 24, 16, 50304, 3e-4, 128, 1),
    "1b": (2048, 16, 8, 50304, 3e-4, 128, 1),
    "1.4b": (2048, 24, 16, 50304, 2e-4, 128, 2),
    "2.8b": (2560, 32, 32, 50304, 1.6e-4, 128, 4),
    "6.9b": (4096, 32, 32, 50432, 1.2e-4, 64, 8),
    "12b": (5120, 36, 40, 50688, 1.2e-4, 64, 16),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", *PUBLISHED])
    config = base()
    config.model.pattern = "attention|mlp"
    config.model.parallel_norms = config.model.bias = True
    config.model.norm = "layer"
    config.model.tie_embeddings = False
    config.model.attention = ATTENTION.defaults(heads=4, rotary=0.25)
    config.model.mlp = MLP.defaults(hidden=166, activation="gelu", gated=False)
    if chosen != "small":
        width, layers, heads, vocab_size, learning_rate, accumulate, fsdp = PUBLISHED[chosen]
        large(config, learning_rate=learning_rate, steps=143_000, remat="block")
        config.batch_size = 1024
        config.optimizer.warmup, config.optimizer.floor = 0.01, 0.1
        config.training.accumulate, config.mesh.fsdp = accumulate, fsdp
        config.model.width, config.model.repeats, config.model.vocab_size = width, layers, vocab_size
        config.model.attention.heads = heads
        config.model.mlp.hidden = 4 * width
        config.model.scan_blocks = 1
    return finish(config, "pythia", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Attention and MLP one after the other, one norm for both, and the share of rotary channels."""
    add({"model.pattern": "attention+mlp", "model.parallel_norms": False})
    add({"model.parallel_norms": False})
    for share in (0.5, 1.0):
        add({"model.attention.rotary": share})
    add({"model.norm": "rms"})
