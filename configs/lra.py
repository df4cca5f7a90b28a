"""The Long Range Arena (Tay et al. 2020) with the hyper-parameters of S4's and S5's repositories (docs/domains.md).

Command:   python train.py --config=configs/lra.py:listops-small,mixer=s5
Hardware:  2 CPU cores for listops-small; one GPU for the others, hours to days.
Expected:  listops-small, S5: accuracy 0.472 on the test split (seed 0; 2026-11-30); the others are not measured

The argument is `preset[,mixer=s5|s4|s4d|...]`. S4D takes S4's numbers, and so does any other config of this folder, in
both directions where its mixers allow it. listops and pathfinder are generated here; text and image need
tensorflow-datasets, retrieval --config.data.path with a table of two texts and a label.

What differs from the repositories: RMSNorm in place of BatchNorm, always before the mixers; text is read by bytes, not
by characters that occur 15 times; ListOps has 17 symbols; pathfinder is drawn here, and without `matched`, as there. A,
B and dt of S4 keep a rate of 1e-3, also in the three tasks in which the repository gives dt the rate of the rest.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from seqmodels.configs import domains
from seqmodels.configs.base import base, finish, preset
from seqmodels.fields.s4 import S4
from seqmodels.fields.s4d import S4D
from seqmodels.fields.s5 import S5

DEFAULT = "listops-small"


class OfS4(NamedTuple):
    """S4's numbers: width D, state N of a channel, rows b, learning rate, steps."""

    width: int
    state: int
    batch_size: int
    learning_rate: float
    steps: int
    dropout: float = 0.0
    dt_min: float = 1e-3


class OfS5(NamedTuple):
    """S5's numbers: width D, state P, blocks J, layers, rows b, epochs, rates of the states and of the rest, ..."""

    width: int
    state: int
    blocks: int
    layers: int
    batch_size: int
    epochs: int
    ssm_rate: float
    factor: float
    weight_decay: float
    dropout: float
    options: dict[str, Any]


class Task(NamedTuple):
    """Rows of length T, the number of them in an epoch, and the two recipes. `preset` is one of configs/domains.py."""

    preset: str
    length: int
    rows: int
    s4: OfS4
    s5: OfS5
    fields: dict[str, Any]
    warmup: float = 0.1


FAST_B = dict(rates="BfastandCdecay")
LISTOPS = dict(depth=10, arguments=10, shortest=500, longest=2000, rows=96000, held=2000)
PATHFINDER = dict(paddles=14, matched=False, images=160000, turned=False)
TASKS = {
    "listops": Task(
        "listops", 2048, 96000, OfS4(256, 4, 32, 1e-2, 120_000),
        OfS5(128, 16, 8, 8, 50, 40, 1e-3, 3, 0.04, 0.0, FAST_B | dict(activation="half_glu2")), LISTOPS,
    ),
    "text": Task(
        "imdb_reviews", 4096, 25000, OfS4(256, 4, 16, 1e-2, 50_000),
        OfS5(256, 192, 12, 6, 50, 35, 1e-3, 4, 0.07, 0.1, dict(dt_global=True, activation="half_glu2")), {},
        warmup=0.0,
    ),
    "retrieval": Task(
        "text_pairs", 8000, 147_086, OfS4(256, 4, 64, 1e-2, 50_000),
        OfS5(128, 256, 16, 6, 32, 20, 1e-3, 2, 0.05, 0.0, dict(dt_global=True)), {},
    ),
    "image": Task(
        "cifar10", 1024, 45000, OfS4(512, 64, 50, 1e-2, 180_000, dropout=0.1),
        OfS5(512, 384, 3, 6, 50, 250, 1e-3, 4.5, 0.07, 0.1, FAST_B), {},
    ),
    "pathfinder": Task(
        "pathfinder", 1024, 160_000, OfS4(256, 64, 64, 4e-3, 500_000),
        OfS5(192, 256, 8, 6, 64, 200, 9e-4, 5, 0.03, 0.05, {}), PATHFINDER | dict(size=32),
    ),
    "path-x": Task(
        "pathfinder", 16384, 160_000, OfS4(256, 64, 16, 1e-3, 500_000, dt_min=1e-4),
        OfS5(128, 256, 16, 6, 32, 75, 6e-4, 3, 0.06, 0.0, dict(rates="BandCdecay", dt_min=1e-4)),
        PATHFINDER | dict(size=128),
    ),
    "listops-small": Task(
        "listops", 100, 20000, OfS4(64, 16, 32, 5e-3, 2000, dropout=0.1),
        OfS5(64, 32, 4, 4, 32, 3, 1e-3, 4, 0.04, 0.1, dict(activation="half_glu2")), {},
    ),
}  # fmt: skip
LAYERS = 6  # of S4
SSM_RATE = 1e-3  # of S4's A, B and dt, whatever the rate of the rest
ONE_WAY = ("conba", "conba_seq", "mixcon", "hgrn")  # configs whose mixers read forwards only


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `preset[,mixer=NAME]`, locked. Raises ValueError if a preset, key or mixer does not exist."""
    first, *rest = (arg or DEFAULT).split(",")
    chosen = preset(first, list(TASKS))
    if any(not part.startswith("mixer=") for part in rest):
        raise ValueError(f"{rest}: the only key is mixer, such as mixer=s5")
    mixer = rest[-1].partition("=")[2] if rest else "s5"
    task, config = TASKS[chosen], base()
    sizes = domains.USUAL | domains.SIZES[task.preset] | dict(length=task.length, pool="mean")
    if mixer == "s5":
        _s5(config, task, sizes)
    else:
        _s4(config, task, mixer, sizes)
    domains.read(config, task.preset, sizes, task.fields)
    config.optimizer.groups = sizes["groups"]
    config.optimizer.b2, config.optimizer.floor, config.optimizer.warmup = 0.999, 0.0, sizes["warmup"]
    config.optimizer.clip = 0.0
    return finish(config, f"lra-{chosen}-{mixer}", "small")


def _s5(config: ConfigDict, task: Task, sizes: dict[str, Any]) -> None:
    """S5's recipe: `sizes` gets what `domains.read` sets."""
    recipe = task.s5
    config.model.pattern, config.model.repeats, config.model.width = "bi:s5", recipe.layers, recipe.width
    config.model.bias = True
    config.model.s5 = S5.defaults(state=recipe.state, blocks=recipe.blocks, **recipe.options)
    each = task.rows / recipe.batch_size
    rates = dict(learning_rate=recipe.ssm_rate * recipe.factor, groups=f"ssm={1 / recipe.factor:.6g}")
    sizes |= rates | dict(batch_size=recipe.batch_size, steps=round(recipe.epochs * each), dropout=recipe.dropout)
    sizes |= dict(weight_decay=recipe.weight_decay, warmup=min(1 / recipe.epochs, 0.1) if task.warmup else 0.0)


def _s4(config: ConfigDict, task: Task, mixer: str, sizes: dict[str, Any]) -> None:
    """S4's recipe, for S4, S4D and any other mixer."""
    recipe = task.s4
    if mixer in ("s4", "s4d"):
        options = dict(state=recipe.state, dt_min=recipe.dt_min)
        config.model.pattern, config.model.repeats, config.model.width = f"bi:{mixer}", LAYERS, recipe.width
        config.model.bias = True
        config.model[mixer] = (S4 if mixer == "s4" else S4D).defaults(**options)
    else:
        config.model = domains.model(mixer, recipe.width, LAYERS, mixer not in ONE_WAY)
    groups = f"ssm={min(SSM_RATE / recipe.learning_rate, 1.0):.6g}" if mixer in ("s4", "s4d") else ""
    sizes |= dict(learning_rate=recipe.learning_rate, batch_size=recipe.batch_size, steps=recipe.steps, groups=groups)
    sizes |= dict(dropout=recipe.dropout, weight_decay=0.05, warmup=0.1)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Learning rates. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    for factor in (0.1, 0.3, 1.0, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})
