"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236) in a Transformer: a feature map replaces softmax.

Command:   python train.py --config=configs/linear_attention.py --workdir=runs/linear_attention
Hardware:  2 CPU cores. `:130m` and `:350m` one GPU of 80 GB, `:1.4b` eight of them (with training.accumulate=4).
Expected:  validation 2.689, test 2.713 bits per byte (small; docs/results/small/report.md; xz -9: 2.591, 2.543)
           with --config.model.short_conv=4. Without it the order of the bytes is not seen: 3.539, 3.562
Cost:      2 minutes of training on 2 CPU cores (small)

Presets: small (no argument), 130m, 350m, 1.4b. They have the shapes and the training of configs/transformer.py, but no
rotary positions, because the paper has none in its attention.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset
from seqmodels.configs.transformer import PAPER
from seqmodels.fields.linear_attention import LINEAR_ATTENTION
from seqmodels.fields.mlp import MLP


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", *PAPER])
    config = base()
    config.model.pattern = "linear_attention+mlp"
    config.model.linear_attention = LINEAR_ATTENTION.defaults(heads=4)
    config.model.mlp = MLP.defaults(hidden=136)
    if chosen != "small":
        width, layers, heads, learning_rate, steps, remat = PAPER[chosen]
        large(config, learning_rate=learning_rate, steps=steps, remat=remat)
        config.model.width, config.model.repeats = width, layers
        config.model.linear_attention.heads = heads
        config.model.mlp.hidden = 3 * width
        config.model.scan_blocks = 1
    return finish(config, "linear_attention", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Feature maps and heads. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    for name in ("relu", "softmax", "taylor"):
        add({"model.linear_attention.feature_map": name})
    for factor in (0.3, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})
