"""Do connections across depth help state space models? The stages of one study, each a sweep (docs/depth.md).

Command:   timeout 540 python sweep.py --config=configs/depth_study.py:25m --sweep=rates --out=sweeps/depth_rates $DATA
Hardware:  one GPU of 80 GB or more; the command is repeated until the sweep is done
Expected:  not run yet
Cost:      docs/depth.md has the planned minutes of an H200

Presets: 25m (no argument; Mamba of 25 M parameters, as in configs/densemamba.py) and 130m, which has the sizes of
Mamba-130m, but 97 M parameters, as the vocabulary is small. $DATA names the text, as there. The stage `rates` comes
first. The others take the forms that it leaves, FINALISTS, which is edited after it. A form is compared with plain
Mamba, or with one of a larger step rank if it has over 0.5 % more parameters.
"""

import itertools
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

Add = Callable[..., None]  # of a trial, and `against`, the trial that it is compared with
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
    "input norm": {"model.dense.variant": "input", "model.dense.norm": True},
    "output": {"model.dense.variant": "output"},
}
STEP_RANKS = {  # of the plain Mamba that has as many parameters as a form; it is 32 with 25 M, and 48 with 130 M
    "25m": {"hyper": 40, "hyper lite": 64, "mudd": 55, **dict.fromkeys(("read", "input", "input norm", "output"), 43)},
    "130m": {"hyper": 56, "hyper lite": 80, "mudd": 86, **dict.fromkeys(("read", "input", "input norm", "output"), 65)},
}
FINALISTS: dict[str, float] = {  # form: learning rate. Placeholders until `rates` has been run
    "none": 3e-3,
    "attnres": 3e-3,
    "hyper": 3e-3,
    "value": 3e-3,
    "mudd": 3e-3,
    "input norm": 3e-3,
}
MIXED = ("attnres", "hyper", "denseformer")  # forms that every mixer can have: the best three of `rates`

# Plans. Plain Mamba of 25 M parameters makes so many tokens a second on one H200 (docs/results/densemamba), one of
# 129 M 301,999. A form has a share of that, measured with 129 M (benchmarks/notes/depth.md), from READ on with 25 M.
SPEED, FALL = 1_285_264, 0.87  # a model of n times as many parameters makes n^-FALL as many
SHARES = {
    "none": 1,
    "value": 0.957,
    "denseformer": 0.812,
    "attnres": 0.944,
    "attnres full": 0.715,
    "attnres delta": 0.715,
    "hyper": 0.841,
    "hyper lite": 0.43,
    "mudd": 0.671,
    "read": 0.483,
    "input": 0.785,
    "input norm": 0.742,
    "output": 0.774,
}
STARTING = 30.0  # seconds of a trial beside its steps: start, compilation, validation


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = "25m" if arg is None else preset(arg, ["25m", "130m"])
    config = densemamba.get_config("25m").unlock()
    if chosen == "130m":
        config.model.width, config.model.repeats = 768, 24
    config.model.dense.variant = "none"
    config.steps = 3052  # 100 M tokens, of which the stages take multiples
    config.checkpoint.every, config.metrics.every, config.metrics.norms = 1000, 10, False
    return finish(config, "depth_study", chosen)


def budget(arg: str | None, times: float) -> Trial:
    """The steps of a run of `times` 100 M tokens."""
    return {"steps": round(times * get_config(arg).steps)}


def control(form: str, arg: str | None) -> Trial:
    """Plain Mamba with as many parameters as a form, to 0.5 %."""
    rank = STEP_RANKS[arg or "25m"].get(form)
    return FORMS["none"] | ({"model.mamba.dt_rank": rank} if rank else {})


def with_controls(add: Add, arg: str | None, forms: dict[str, Trial]) -> None:
    """Adds forms and their controls, which are trained as plain Mamba is. forms: how each form is trained."""
    plain = forms["none"]
    for form, trained in forms.items():
        add(FORMS[form] | trained, against=control(form, arg) | plain)
    for form in forms:
        if control(form, arg) != FORMS["none"]:
            add(control(form, arg) | plain, against=FORMS["none"] | plain)


def rates(add: Add, arg: str | None = None) -> None:
    """Every form at three learning rates, 100 M tokens. For --seeds=1. The first third of it has all at one rate."""
    for rate in vary("optimizer.learning_rate", 3e-3, 1.5e-3, 6e-3):
        with_controls(add, arg, dict.fromkeys(FORMS, budget(arg, 1) | rate))


def seeds(add: Add, arg: str | None = None) -> None:
    """The finalists, 500 M tokens. For --seeds=3, and 5 if close."""
    with_controls(add, arg, {form: budget(arg, 5) | rate_of(form) for form in FINALISTS})


def equal_time(add: Add, arg: str | None = None) -> None:
    """The finalists in whole schedules of the time in which plain Mamba reads 100 M and 300 M tokens. For --seeds=2."""
    for times in (1, 3):
        with_controls(add, arg, {form: budget(arg, times * SHARES[form]) | rate_of(form) for form in FINALISTS})


def size(add: Add, arg: str | None = None) -> None:
    """The first three finalists, 500 M tokens. For the preset 130m and --seeds=1."""
    with_controls(add, arg, {form: budget(arg, 5) | rate_of(form) for form in list(FINALISTS)[:3]})


def rate_of(form: str) -> Trial:
    """The learning rate of a finalist."""
    return {"optimizer.learning_rate": FINALISTS[form]}


def mixers(add: Add, arg: str | None = None) -> None:
    """Four other mixers, without and with three forms, 100 M tokens, two rates. For --seeds=2."""
    kinds: list[tuple[Trial, Trial]] = [  # and what gives the plain one as many parameters as hyper-connections
        (
            {"model.pattern": "mamba2", **options("mamba2", MAMBA2.defaults(head_dim=64, state=64))},
            {"model.mamba2.state": 80},
        ),
        (
            {
                "model.pattern": "retnet+mlp",
                "model.repeats": 6,
                "model.short_conv": 4,
                **options("retnet", RETNET.defaults(heads=4)),
                **options("mlp", MLP.defaults(hidden=1024)),
            },
            {"model.mlp.hidden": 1048},
        ),
        (
            {
                "model.pattern": "attention+mlp",
                "model.repeats": 6,
                **options("attention", ATTENTION.defaults(heads=8)),
                **options("mlp", MLP.defaults(hidden=1408)),
            },
            {"model.mlp.hidden": 1432},
        ),
        (
            {"model.pattern": "gated_deltanet", **options("gated_deltanet", GATED_DELTANET.defaults(heads=4))},
            {"model.gated_deltanet.key_dim": 100, "model.gated_deltanet.value_dim": 192},
        ),
    ]
    for (kind, larger), rate in itertools.product(kinds, vary("optimizer.learning_rate", 1.5e-3, 3e-3)):
        plain = budget(arg, 1) | kind | rate | FORMS["none"]
        for form in ("none", *MIXED):
            add(plain | FORMS[form], against=plain | larger if form == "hyper" else plain)
        if "hyper" in MIXED:
            add(plain | larger, against=plain)


def options(branch: str, values: ConfigDict) -> Trial:
    """The fields of a branch."""
    return {f"model.{branch}.{name}": value for name, value in values.items()}


def transfer(add: Add, arg: str | None = None) -> None:
    """Plain Mamba of 12 layers and 25 to 134 M parameters by its width, five learning rates, 50 M tokens each."""
    width = get_config(arg).model.width
    widths = vary("model.width", width, 3 * width // 2, 2 * width, 5 * width // 2)
    common = budget(arg, 0.5) | FORMS["none"]
    for trial in product([common], vary("optimizer.learning_rate", 3e-3, 1.5e-3, 6e-3, 7.5e-4, 1.2e-2), widths):
        add(trial)


SWEEPS = {
    "rates": rates, "seeds": seeds, "equal_time": equal_time, "mixers": mixers, "size": size, "transfer": transfer
}  # fmt: skip


def minutes(sweep: str, arg: str | None, repeats: int) -> float:
    """Planned minutes of one H200, for so many seeds. Other mixers count as fast as Mamba."""
    trials: dict[str, Trial] = {}

    def add(trial: Trial, against: Trial | None = None) -> None:
        trials[str(sorted(trial.items()))] = trial

    SWEEPS[sweep](add, arg)
    return repeats * sum(seconds(trial, arg) for trial in trials.values()) / 60


def seconds(trial: Trial, arg: str | None) -> float:
    """Planned seconds of one trial."""
    config = get_config(arg).unlock()
    config.model.width = trial.get("model.width", config.model.width)
    size = densemamba.parameters(config.model) / densemamba.parameters(get_config("25m").model)
    form = max((name for name in FORMS if FORMS[name].items() <= trial.items()), key=lambda name: len(FORMS[name]))
    speed = SPEED * SHARES[form] * size**-FALL
    return STARTING + trial["steps"] * config.batch_size * config.seq_len / speed
