"""DenseMamba: Mamba whose layers also use the hidden states of the layers below (He et al. 2024, arXiv 2403.00818).

Command:   python train.py --config=configs/densemamba.py --workdir=runs/densemamba
Hardware:  2 CPU cores. `:130m` and `:350m` one GPU of 80 GB, `:1.4b` eight of them (with training.accumulate=4).
Expected:  validation 2.069, test 2.095 bits per byte (small; docs/results/small/report.md; xz -9: 2.591, 2.543)
Cost:      3.3 minutes of training on 2 CPU cores (small: 1000 steps of 0.2 s, benchmarks/notes/cpu_step.md)

Presets: small (no argument), 25m (for ablations), 130m, 350m, 1.4b. The last three are Mamba's (configs/mamba.py).
Every layer has dense links of depth 2: its query also reads the states of the two layers below, and a gate of inner
width D / 32 scales the result. The gates add about 1 % of parameters. Neither code nor weights of the paper's
DenseMamba were published. `model.dense.variant` says which interpretation is built (docs/densessm.md).
"""

import copy
from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, large, preset, short
from seqmodels.configs.mamba import add_mamba
from seqmodels.configs.trials import product, vary

# name: (width, layers, peak learning rate, steps, remat); as in the Mamba paper
PAPER = {
    "130m": (768, 24, 3e-3, 4800, "streams"),
    "350m": (1024, 48, 1.5e-3, 13500, "streams"),
    "1.4b": (2048, 48, 1e-3, 50000, "streams"),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small", "25m", *PAPER])
    config = base()
    config.model.pattern = "mamba"
    add_mamba(config)
    config.model.dense.variant = "read"
    if chosen == "25m":
        short(config, learning_rate=3e-3)
        config.model.width, config.model.repeats = 512, 12
    elif chosen != "small":
        width, layers, learning_rate, steps, remat = PAPER[chosen]
        large(config, learning_rate=learning_rate, steps=steps, remat=remat)
        config.model.width, config.model.repeats = width, layers
        config.model.scan_blocks = 1  # unrolled, three states per layer take minutes to compile for a GPU
    return finish(config, "densemamba", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Variants, gates, depth and placement of the dense links, against controls without links.

    The controls have as many parameters as the default DenseMamba: one is wider, the other has a larger step rank. RANK
    and CARRY run as separate scans, which are fast enough only at small sizes.
    """
    model = get_config(arg).model
    variant, gate, depth = "model.dense.variant", "model.dense.gate", "model.dense.depth"
    add({variant: "none"})
    add({variant: "none", "model.width": matching(model, "width")})
    add({variant: "none", "model.mamba.dt_rank": matching(model, "dt_rank")})
    add({variant: "output"})
    for trial in product(vary(variant, "input"), vary("model.dense.norm", False, True)):
        add(trial)
    for trial in product(vary(variant, "read"), vary(gate, "channel", "both", "none")):
        add(trial)
    for trial in product(vary(variant, "read"), vary(depth, *(m for m in (1, 2, 4) if m != model.dense.depth))):
        add(trial)
    for every in (2, 4):
        if every < model.repeats:  # else no layer has links
            scan = {"model.scan_blocks": every} if model.scan_blocks else {}  # a super-block holds a whole period
            add({variant: "read", "model.dense.every": every, **scan})
    if model.width <= 128:
        for trial in vary(variant, "rank", "carry"):
            add(trial)


def budgets(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Validation loss against training time, because READ's steps take longer.

    Each model trains for a number of steps and for twice that number. Every run has a whole schedule.
    """
    steps = get_config(arg).steps
    for variant, times in (("none", (1, 2)), ("read", (0.5, 1))):
        for trial in vary("steps", *(round(steps * n) for n in times)):
            add({"model.dense.variant": variant, **trial})


def pair(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Only Mamba and DenseMamba: for large sizes."""
    for trial in vary("model.dense.variant", "none", "read"):
        add(trial)


def miniature(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Two trials in a minute or two on 2 CPU cores. They show that a sweep works, and nothing about the models."""
    small = {
        "steps": 60,
        "seq_len": 64,
        "model.width": 32,
        "model.repeats": 2,
        "model.scan_blocks": 0,
        "model.dense.depth": 1,
        "optimizer.learning_rate": 1e-2,
        "sample.tokens": 0,
        "evaluation.batch_size": 128,
        "evaluation.rows": 16,
        "evaluation.lengths": (1, 4),
    }
    for trial in product([small], vary("model.dense.variant", "none", "read")):
        add(trial)


SWEEPS = {"budgets": budgets, "pair": pair, "miniature": miniature}  # beside `sweep`, which is "ablation"


def matching(model: ConfigDict, field: str) -> int:
    """The `width` or `dt_rank` for which Mamba without links has as nearly as possible as many parameters as READ.

    If the tokenizer is not bytes, set model.vocab_size. Otherwise its embeddings do not count.
    """
    model = copy.deepcopy(model).unlock()
    model.dense.update(variant="read", gate="channel")
    target, model.dense.variant = parameters(model), "none"
    part, first = (model, model.width) if field == "width" else (model.mamba, -(-model.width // 16))

    def excess(value: int) -> int:
        part[field] = value
        return abs(parameters(model) - target)

    return min(range(first, 2 * model.width), key=excess)


def parameters(model: ConfigDict) -> int:
    """Number of parameters of a stack of Mamba layers, without links or with READ and gate=channel, from its sizes."""
    D, N, W = model.width, model.mamba.state, model.mamba.conv
    E = model.mamba.expand * D
    R = model.mamba.dt_rank or -(-D // 16)
    V = -(-(model.vocab_size or 257) // model.vocab_multiple) * model.vocab_multiple
    mamba = 2 * D * E + W * E + E + E * (R + 2 * N) + R * E + E + E * N + E + E * D
    embeddings = V * D * (1 if model.tie_embeddings else 2)
    total = embeddings + D + model.repeats * (mamba + D)  # and an RMSNorm before each layer, and after the last
    if model.dense.variant == "none":
        return total
    rank = max(1, D // model.dense.bottleneck)
    linked = [min(model.dense.depth, l) for l in range(0, model.repeats, model.dense.every) if l]
    return total + sum(rank * (D + E * (sources if model.dense.per_source else 1)) for sources in linked)
