"""Do connections across depth help state space models? The stages of one study, each a sweep (docs/depth.md).

Command:   timeout 540 python sweep.py --config=configs/depth_study.py:25m --sweep=rates --out=sweeps/depth_rates $DATA
Hardware:  one GPU of 80 GB or more; the command is repeated until the sweep is done
Expected:  not run yet
Cost:      docs/depth.md has the planned minutes of an H200

Presets: 25m (no argument; Mamba of 25 M parameters, as in configs/densemamba.py) and 130m. $DATA names the text, as
there. The stage `rates` comes first. The others take the forms that it leaves, FINALISTS, which is edited after it.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs import densemamba
from seqmodels.configs.base import finish, preset
from seqmodels.configs.trials import Trial, product, vary
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.gated_deltanet import GATED_DELTANET
from seqmodels.fields.mamba2 import MAMBA2
from seqmodels.fields.mlp import MLP
from seqmodels.fields.retnet import RETNET

STEP_TOKENS = 32 * 1024
FORMS: dict[str, Trial] = {
    "none": {"model.depth": "none"},
    "value": {"model.depth": "value"},
    "denseformer": {"model.depth": "denseformer"},
    "attnres": {"model.depth": "attnres"},
    "attnres full": {"model.depth": "attnres", "model.attnres.form": "full"},
    "attnres delta": {"model.depth": "attnres", "model.attnres.form": "delta"},
    "hyper": {"model.depth": "hyper"},
    "hyper lite": {"model.depth": "hyper", "model.hyper.mixing": "lite"},
    "mudd": {"model.depth": "mudd"},
    "read": {"model.dense.variant": "read"},
    "input": {"model.dense.variant": "input"},
    "output": {"model.dense.variant": "output"},
}
FINALISTS: dict[str, float] = {  # form: learning rate. Placeholders until `rates` has been run
    "none": 3e-3,
    "attnres": 3e-3,
    "hyper": 3e-3,
    "value": 3e-3,
    "mudd": 3e-3,
    "input": 3e-3,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = "25m" if arg is None else preset(arg, ["25m", "130m"])
    config = densemamba.get_config(chosen).unlock()
    config.model.dense.variant = "none"
    config.model.scan_blocks, config.model.remat = 0, "none"
    return finish(config, "depth_study", chosen)


def tokens(millions: float) -> Trial:
    """The fields of a run of so many tokens, in batches of 32 rows of 1,024 tokens."""
    return {"steps": round(millions * 1e6 / STEP_TOKENS), "batch_size": 32, "seq_len": 1024}


def finalists(first: int | None = None) -> list[Trial]:
    """The first of the finalists, or all, each at its learning rate."""
    return [FORMS[name] | {"optimizer.learning_rate": rate} for name, rate in list(FINALISTS.items())[:first]]


def rates(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Every form at three learning rates, 100 M tokens. For --seeds=1."""
    for trial in product([tokens(100)], list(FORMS.values()), vary("optimizer.learning_rate", 1.5e-3, 3e-3, 6e-3)):
        add(trial)


def seeds(add: Callable[[dict], None], arg: str | None = None) -> None:
    """The finalists, and plain Mamba with as many parameters as READ, 500 M tokens. For --seeds=3, and 5 if close."""
    rank = densemamba.matching(get_config(arg).model, "dt_rank")
    matched = {"model.mamba.dt_rank": rank, "optimizer.learning_rate": FINALISTS["none"]}
    for trial in product([tokens(500)], [*finalists(), matched]):
        add(trial)


def equal_time(add: Callable[[dict], None], arg: str | None = None) -> None:
    """The finalists in whole schedules of three lengths; those of equal time are compared. For --seeds=2."""
    for trial in product(finalists(), [tokens(n) for n in (70, 100, 140)]):
        add(trial)


def mixers(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Four other mixers, without and with three forms that all can have, 100 M tokens, two rates. For --seeds=2."""
    kinds: list[Trial] = [
        {"model.pattern": "mamba2", **options("mamba2", MAMBA2.defaults(head_dim=64, state=64))},
        {
            "model.pattern": "retnet+mlp",
            "model.repeats": 6,
            "model.short_conv": 4,
            **options("retnet", RETNET.defaults(heads=4)),
            **options("mlp", MLP.defaults(hidden=1024)),
        },
        {
            "model.pattern": "attention+mlp",
            "model.repeats": 6,
            **options("attention", ATTENTION.defaults(heads=8)),
            **options("mlp", MLP.defaults(hidden=1408)),
        },
        {"model.pattern": "gated_deltanet", **options("gated_deltanet", GATED_DELTANET.defaults(heads=4))},
    ]
    chosen = [FORMS[name] for name in ("none", "attnres", "hyper", "denseformer")]
    for trial in product([tokens(100)], kinds, chosen, vary("optimizer.learning_rate", 1.5e-3, 3e-3)):
        add(trial)


def options(branch: str, values: ConfigDict) -> Trial:
    """The fields of a branch."""
    return {f"model.{branch}.{name}": value for name, value in values.items()}


def size(add: Callable[[dict], None], arg: str | None = None) -> None:
    """The first three finalists, 500 M tokens. For the preset 130m and --seeds=1."""
    for trial in product([tokens(500)], finalists(3)):
        add(trial)


SWEEPS = {"rates": rates, "seeds": seeds, "equal_time": equal_time, "mixers": mixers, "size": size}
