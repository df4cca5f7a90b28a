"""Griffin (De et al. 2024, arXiv 2402.19427): two recurrent layers to one of attention with a window, MLPs between.

Command:   python train.py --config=configs/griffin.py --workdir=runs/griffin
Hardware:  2 CPU cores.
Expected:  not measured yet
Cost:      about 4 minutes of training on 2 CPU cores (small; that of configs/mamba.py takes 4)

Preset: small. It has Griffin's layout: one head of keys for all queries, windows, gated MLPs with gelu. Its recurrent
layer is Mamba in place of the RG-LRU, which is not a branch yet; so there are no presets of the paper's sizes.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, preset
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.mamba import MAMBA
from seqmodels.fields.mlp import MLP


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small"])
    config = base()
    config.model.pattern = "mamba+mlp x2 attention+mlp"
    config.model.repeats = 1
    config.model.norm_eps = 1e-6
    config.model.mamba = MAMBA.defaults()
    config.model.attention = ATTENTION.defaults(heads=4, kv_heads=1, window=64)
    config.model.mlp = MLP.defaults(hidden=170, activation="gelu")
    return finish(config, "griffin", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """The recurrent layer alone (Hawk), the ratio, attention that sees the whole text, and the window."""
    for pattern in ("mamba+mlp x3", "mamba+mlp attention+mlp x2"):
        add({"model.pattern": pattern})
    for window in (0, 16):
        add({"model.attention.window": window})
