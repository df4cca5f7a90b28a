"""DenseRetNet (He et al. 2024, arXiv 2403.00818): RetNet blocks that add the keys and values of the layers below.

Command:   python train.py --config=configs/denseretnet.py --workdir=runs/denseretnet
Hardware:  2 CPU cores. `:350m` one GPU of 80 GB, `:1.3b` eight of them (with training.accumulate=4).
Expected:  validation 2.365, test 2.387 bits per byte (small; docs/results/small/report.md; xz -9: 2.591, 2.543)
Cost:      4 minutes of training on 2 CPU cores (small)

Presets: small (no argument) and 25m (for ablations). 350m and 1.3b are the released checkpoints "DenseMamba-350M" and
"-1.3B" (which are RetNets), with links of depth 2. 350m-code and 1.3b-code are the configs of the authors' repository,
with depth 1 and other bottlenecks. seqmodels/interop/denseretnet.py imports their weights. Theirs have 373,277,184 and
1,387,783,680 parameters (-code: 367,968,768 and 1,334,023,680). Ours have fewer, because they leave out the links of
layer 0, which have no effect.

The block is gated retention with SiLU on queries, keys and values, and without an MLP. `dense.variant=read` and `rank`
apply DenseSSM to the state itself. `none` is the same RetNet without links. Two things differ from the authors' code:
the matrix of the logits starts with a standard deviation of width^-1/2, and dropout also applies to the embeddings.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset, short
from seqmodels.configs.retnet import add_retnet
from seqmodels.configs.trials import vary

# name: (width, layers, heads, depth, bottleneck of keys' gates, of values')
PAPER = {
    "350m": (1536, 16, 2, 2, 8, 32),
    "1.3b": (2560, 25, 4, 2, 16, 8),
    "350m-code": (1536, 16, 2, 1, 32, 32),
    "1.3b-code": (2560, 25, 4, 1, 32, 32),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", "25m", *PAPER])
    config = base()
    config.model.pattern = "retnet"
    config.model.norm_eps = 1e-6
    add_retnet(config)
    config.model.retnet.update(dict(activation="silu", row_scale=True, norm_weight=True, init_std=0.02))
    config.model.dense.update(dict(variant="input", gate="both", norm=True, norm_eps=1e-6))
    config.model.dense.update(dict(bottleneck_state=8, gate_std=0.02))
    if chosen == "small":
        config.model.retnet.key_dim = 32  # width / heads / 2, as in all presets
    elif chosen == "25m":
        short(config, learning_rate=3e-3)
        config.model.width, config.model.repeats = 512, 12
        config.model.retnet.key_dim = 128
        config.model.dense.update(dict(bottleneck=32, bottleneck_state=8))
    else:
        width, layers, heads, depth, keys, values = PAPER[chosen]
        large(config, learning_rate=6e-4, steps=28_600, remat="block")  # 15 B tokens
        config.model.width, config.model.repeats = width, layers
        config.model.retnet.update(dict(heads=heads, key_dim=width // heads // 2))
        config.model.dense.update(dict(depth=depth, bottleneck=values, bottleneck_state=keys))
        config.model.vocab_size = 32_001
        config.model.tie_embeddings = False
        config.model.dropout = 0.1
        config.model.scan_blocks = 1
        config.optimizer.update(dict(b2=0.98, weight_decay=0.01, warmup=0.015))
        config.optimizer.update(dict(schedule="wsd", decay=1.0, floor=0.0))  # a straight line to zero
    return finish(config, "denseretnet", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """The published form against none, READ and RANK, depth and decays. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    add({"model.dense.variant": "none"})
    for gate in ("channel", "both"):
        add({"model.dense.variant": "read", "model.dense.gate": gate, "model.dense.norm": False})
    add({"model.dense.variant": "rank", "model.dense.gate": "both", "model.dense.norm": False})
    add({"model.dense.variant": "output", "model.dense.gate": "channel", "model.dense.norm": False})
    add({"model.dense.norm": False})
    for depth in (1, 2, 4):
        if depth != config.model.dense.depth:
            add({"model.dense.depth": depth})
    add({"model.retnet.schedule": "spread"})


def forms(add: Callable[[dict], None], arg: str | None = None) -> None:
    """RetNet, the published DenseRetNet, and READ and RANK on the states themselves. Only the published one has a norm.

    The second RetNet has keys a quarter wider: about as many parameters more as the published form's gates.
    """
    config = get_config(arg)
    add({"model.dense.variant": "none"})
    add({"model.dense.variant": "none", "model.retnet.key_dim": 5 * config.model.retnet.key_dim // 4})
    add({"model.dense.variant": "input"})
    for variant in ("read", "rank"):
        add({"model.dense.variant": variant, "model.dense.gate": "both", "model.dense.norm": False})
    add({"model.dense.variant": "read", "model.dense.gate": "channel", "model.dense.norm": False})


def rates(add: Callable[[dict], None], arg: str | None = None) -> None:
    """RetNet without links at several learning rates, from which to choose the preset's."""
    for trial in vary("optimizer.learning_rate", 1.5e-3, 3e-3, 6e-3):
        add({"model.dense.variant": "none", **trial})


SWEEPS = {"forms": forms, "rates": rates}  # beside `sweep`, which is "ablation"
