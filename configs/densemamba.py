"""DenseMamba: Mamba whose layers also read the hidden states of the layers below (He et al. 2024, arXiv 2403.00818).

Command:   python train.py --config=configs/densemamba.py --workdir=runs/densemamba
Hardware:  2 CPU cores. `:130m` and `:350m` one GPU of 80 GB, `:1.4b` eight of them (lower training.accumulate to 4).
Expected:  validation 2.069, test 2.095 bits per byte (small; 2026-11-22, docs/results/small.md; xz -9: 2.591, 2.543)
Cost:      7 minutes of training on 2 CPU cores (small)

Presets: small (no argument), 130m, 350m, 1.4b. The last three are Mamba's sizes (configs/mamba.py) with dense links of
depth 2 on every layer, read out by the current layer's query through a gate of inner width D / 32, which adds about 1 %
of parameters. Neither code nor weights of the paper's DenseMamba were published: `variant` names what is built.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs.base import base, finish, large, preset
from configs.mamba import add_mamba

# name: (width, layers, peak learning rate, steps, remat); as in the Mamba paper
PAPER = {
    "130m": (768, 24, 3e-3, 4800, "streams"),
    "350m": (1024, 48, 1.5e-3, 13500, "streams"),
    "1.4b": (2048, 48, 1e-3, 50000, "streams"),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError on a preset that is not."""
    chosen = preset(arg, ["small", *PAPER])
    config = base()
    config.model.pattern = "mamba"
    add_mamba(config)
    config.model.dense.variant = "read"
    if chosen != "small":
        width, layers, learning_rate, steps, remat = PAPER[chosen]
        large(config, learning_rate=learning_rate, steps=steps, remat=remat)
        config.model.width, config.model.repeats = width, layers
        config.model.scan_blocks = 1  # unrolled, three states a layer take minutes to compile for a GPU
    return finish(config, "densemamba", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """What the dense links are worth: variants, gates, depth and placement, against two controls without links.

    Each trial is a dict of dotted fields. The second control gives the gates' parameters to the step size instead.
    """
    model = get_config(arg).model
    width = model.width
    add({"model.dense.variant": "none"})
    add({"model.dense.variant": "none", "model.mamba.dt_rank": -(-width // 16) + 3 * width // 128})
    add({"model.dense.variant": "output"})
    for norm in (False, True):
        add({"model.dense.variant": "input", "model.dense.norm": norm})
    add({"model.dense.variant": "rank"})
    if width <= 128:
        add({"model.dense.variant": "carry"})  # a scan of its own: only worth its time at small sizes
    for gate in ("channel", "both", "none"):
        add({"model.dense.variant": "read", "model.dense.gate": gate})
    for depth in (1, 4):
        add({"model.dense.variant": "read", "model.dense.depth": depth})
    for every in (2, 4):
        scan = {"model.scan_blocks": every} if model.scan_blocks else {}  # a super-block holds a whole period
        add({"model.dense.variant": "read", "model.dense.every": every, **scan})
