"""RetNet (Sun et al. 2023, arXiv 2307.08621): retention in heads that forget at fixed rates, and an MLP.

Command:   python train.py --config=configs/retnet.py --workdir=runs/retnet
Hardware:  2 CPU cores. `:200m` one GPU of 80 GB; `:1.3b` and larger eight of them (lower training.accumulate).
Expected:  validation 2.384, test 2.407 bits per byte (small; docs/results/small/report.md; xz -9: 2.591, 2.543)
Cost:      2 minutes of training on 2 CPU cores (small)

Presets: small (no argument), 200m (the paper's ablations), 1.3b, 2.7b, 6.7b. The paper gives two sets of decays. Its
code and DenseRetNet use `octaves`. The paper says that its experiments used `spread`.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset
from seqmodels.fields.mlp import MLP
from seqmodels.fields.retnet import RETNET

# name: (width, layers, heads, peak learning rate, steps, rows a step, remat); tables 2 and 7, section 3.5
PAPER = {
    "200m": (1024, 16, 4, 6e-4, 10_000, 256, "none"),
    "1.3b": (2048, 24, 8, 6e-4, 25_000, 2048, "block"),
    "2.7b": (2560, 32, 10, 3e-4, 25_000, 2048, "block"),
    "6.7b": (4096, 32, 16, 3e-4, 25_000, 2048, "block"),
}


def add_retnet(config: ConfigDict) -> None:
    """Fields of the retention mixer (seqmodels/mixers/retnet.py), with the paper's values."""
    config.model.retnet = RETNET.defaults()


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", *PAPER])
    config = base()
    config.model.pattern = "retnet+mlp"
    add_retnet(config)
    config.model.mlp = MLP.defaults(hidden=96, activation="gelu", gated=False)
    if chosen == "small":
        config.model.repeats = 3  # and a narrow MLP: as many parameters as configs/densemamba.py
    else:
        width, layers, heads, learning_rate, steps, rows, remat = PAPER[chosen]
        large(config, learning_rate=learning_rate, steps=steps, remat=remat)
        config.batch_size, config.training.accumulate = rows, rows // 8
        config.model.width, config.model.repeats, config.model.retnet.heads = width, layers, heads
        config.model.mlp.hidden = 2 * width
        config.model.scan_blocks = 1
        config.model.dropout = 0.1
        config.optimizer.update(dict(b2=0.98, weight_decay=0.01, clip=2.0, warmup=375.0))
        config.optimizer.update(dict(schedule="wsd", decay=1.0, floor=0.0))  # a straight line to zero
    return finish(config, "retnet", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """The paper's ablation of heads, decays and norm, and dense links. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    for heads in (1, 2, 4, 8):
        if heads != config.model.retnet.heads:
            add({"model.retnet.heads": heads})
    add({"model.retnet.schedule": "spread"})
    add({"model.retnet.row_scale": True})
    for variant in ("read", "rank", "input"):
        add({"model.dense.variant": variant})
