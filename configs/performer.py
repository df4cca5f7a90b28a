"""Performer (Choromanski et al. 2021, arXiv 2009.14794): softmax attention estimated by positive random features.

Command:   python train.py --config=configs/performer.py --workdir=runs/performer
Hardware:  2 CPU cores. `:130m` and `:350m` one GPU of 80 GB, `:1.4b` eight of them (with training.accumulate=4).
Expected:  validation 2.585, test 2.610 bits per byte (small; docs/results/small/report.md; xz -9: 2.591, 2.543)
           with --config.model.short_conv=4. Without it the order of the bytes is not seen: 3.495, 3.510
Cost:      3 minutes of training on 2 CPU cores (small)

Presets: small (no argument), 130m, 350m, 1.4b. They have the shapes and the training of configs/transformer.py, and the
paper's 256 features for heads of 64 channels.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset
from seqmodels.configs.transformer import PAPER
from seqmodels.fields.mlp import MLP
from seqmodels.fields.performer import PERFORMER


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", *PAPER])
    config = base()
    config.model.pattern = "performer+mlp"
    config.model.performer = PERFORMER.defaults(heads=4, random_features=64)
    config.model.mlp = MLP.defaults(hidden=136)
    if chosen != "small":
        width, layers, heads, learning_rate, steps, remat = PAPER[chosen]
        large(config, learning_rate=learning_rate, steps=steps, remat=remat)
        config.model.width, config.model.repeats = width, layers
        config.model.performer.update(dict(heads=heads, random_features=256))
        config.model.mlp.hidden = 3 * width
        config.model.scan_blocks = 1
    return finish(config, "performer", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Number and kind of features, and redrawing. Each trial is a dict of dotted fields."""
    features = get_config(arg).model.performer.random_features
    for factor in (0.25, 4):
        add({"model.performer.random_features": int(features * factor)})
    add({"model.performer.orthogonal": False})
    add({"model.performer.qk_norm": True})
    for redraw in (1, 100):
        add({"model.performer.redraw": redraw})
