"""Data beyond text: images, series, DNA, sound, texts with a class (docs/domains.md). One config for all mixers.

Command:   python train.py --config=configs/domains.py:digits,mixer=mamba
Hardware:  2 CPU cores for digits, vowels, listops; one GPU for long rows.

The argument is `preset[,key=value...]`. The keys are `mixer` (any other config of this folder; without it the one of
OWN), `bi` (True: the mixers read in both directions), `width`, `layers`, and the fields of the data. All other settings
are flags, such as --config.steps=500. --sweep=mixers compares six models on one preset. The presets of PATHS need
--config.data.path; some others need a package, and the message says how to fetch it.
"""

import importlib
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from seqmodels import pattern
from seqmodels.configs.base import base, finish, preset
from seqmodels.data.domains.examples import FORMS, row_length
from seqmodels.fields.run import DOMAIN_DATA

DEFAULT = "digits"

# Fields of each domain (seqmodels/data/domains) with their values in its preset
FIELDS: dict[str, dict[str, Any]] = {
    "digits": dict(split="last", validation=0.1, warp=0.1),
    "mnist5k": dict(permuted=False, validation=0.1, warp=0.05),
    "forda": dict(set="FordA", ending="tsv", validation=0.1, gaps=False),
    "vowels": dict(set="JapaneseVowels", ending="ts", validation=0.1, gaps=False),
    "electricity": dict(
        file="vic_elec.csv", columns="Demand,Temperature", lookback=96, horizon=96, season=48, form="window", gaps=False
    ),
    "pathfinder": dict(size=32, paddles=6, matched=True, images=20000, turned=True),
    "pendulum": dict(films=2000, held=1000, times=100, missing=0.0),
    "listops": dict(depth=4, arguments=5, shortest=10, longest=100, rows=20000, held=1000),
    "bases": dict(reverse_complement=True),
    "species": dict(rows=20000, held=2000),
    "sound": dict(every=1, other="", bands=0, scale="band", vary=0.0, hide=0.0),
    "words": dict(every=1, other="", bands=24, scale="clip", vary=0.15, hide=0.2),
    "waves": dict(every=1),
    "texts": dict(text="text", label="label"),
    "text_pairs": dict(text="text", label="label", other="other"),
    "mnist": dict(validation=0.1, grey=True, warp=0.05),
    "cifar10": dict(validation=0.1, grey=True, warp=0.0),
    "speech_commands": dict(validation=0.1),
    "imdb_reviews": dict(validation=0.1),
}
NAMES = {"forda": "series", "vowels": "series", "words": "sound"}  # presets whose domain has another name
OWN: dict[str, dict[str, Any]] = {  # mixers of presets where none is named; of the others mamba
    "mnist5k": dict(mixer="s5", bi=True),
    "forda": dict(mixer="s5", bi=True),
    "electricity": dict(mixer="s5", bi=True),
    "pathfinder": dict(mixer="cnn", bi=True),
    "species": dict(mixer="mamba", bi=True),
    "words": dict(mixer="s5", bi=True),
    "pendulum": dict(mixer="s5", bi=True),
}
COMPARED = (("s4d", False), ("s5", False), ("mamba", False), ("mamba", True), ("lstm", False), ("transformer", False))
SLOW = ("s4", "s4d", "s5")  # mixers whose states learn at a quarter of the rate, as S4's and S5's do
PATHS = ("bases", "species", "sound", "words", "waves", "texts", "text_pairs")

FRAMES: dict[str, Any] = dict(input="frames", head="classify", pool="mean")
TOKENS: dict[str, Any] = dict(input="tokens", head="classify", pool="mean")
NEXT: dict[str, Any] = dict(input="tokens", head="next_token", pool="mean")
USUAL: dict[str, Any] = dict(
    batch_size=32, steps=1000, width=64, layers=2, learning_rate=3e-3, weight_decay=0.05, dropout=0.1
)
# Sizes of each preset: the row's length in steps, what a training run takes, and where those of their configs are for
# longer rows, the range of the step sizes of SLOW mixers, and the state of S5
SIZES: dict[str, dict[str, Any]] = {
    "digits": FRAMES | dict(length=64),
    "mnist5k": FRAMES | dict(length=784, steps=1200, width=96, layers=4, batch_size=96, learning_rate=4e-3),
    "forda": FRAMES | dict(length=500, steps=600, batch_size=64),
    "vowels": FRAMES | dict(length=29, steps=500),
    "electricity": FRAMES
    | dict(length=96, head="window", pool="last", steps=1500, batch_size=128, learning_rate=1e-3, dropout=0.2),
    "pathfinder": FRAMES
    | dict(length=1024, pool="max", steps=6000, width=128, layers=6, batch_size=64, learning_rate=1e-3, dropout=0.0),
    "pendulum": FRAMES
    | dict(length=50, head="regress_steps", steps=3000, dropout=0.0, weight_decay=0.0, dt=(0.01, 1.0)),
    "listops": TOKENS | dict(length=100, steps=2000),
    "bases": NEXT | dict(length=1024, steps=1000, width=256, layers=4, batch_size=64, dropout=0.0),
    "species": TOKENS | dict(length=64, steps=2500, width=128, batch_size=256),
    "words": FRAMES | dict(length=100, steps=600, batch_size=64, dropout=0.2, dt=(0.01, 1.0), state=64),
    "sound": FRAMES | dict(length=16000, steps=5000, width=128, layers=6, batch_size=16),
    "waves": NEXT | dict(length=8000, steps=10000, width=128, layers=6, batch_size=8),
    "texts": TOKENS | dict(length=1024, steps=5000, width=128, layers=4),
    "text_pairs": TOKENS | dict(head="pair", length=2048, steps=5000, width=128, layers=4),
    "mnist": FRAMES | dict(length=784, steps=20000, width=128, layers=4),
    "cifar10": FRAMES | dict(length=1024, steps=40000, width=256, layers=6, batch_size=64),
    "speech_commands": FRAMES | dict(length=16000, steps=40000, width=128, layers=6, batch_size=16),
    "imdb_reviews": TOKENS | dict(length=4096, steps=20000, width=256, layers=4),
}
KEYS: dict[str, type] = dict(mixer=str, bi=bool, width=int, layers=int)


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `preset[,key=value...]`, locked. Raises ValueError if a preset, key or value does not exist."""
    chosen, keys = parse(arg or DEFAULT)
    sizes = USUAL | SIZES[chosen] | {key: keys[key] for key in ("width", "layers") if key in keys}
    config = base()
    config.model = model(keys["mixer"], sizes["width"], sizes["layers"], keys["bi"])
    fit_system(config.model, keys["mixer"], sizes)
    if chosen == "pathfinder" and keys["mixer"] == "cnn":
        config.model.cnn.dilations = (1, keys.get("size", FIELDS[chosen]["size"]))  # pixels beside, and in other rows
    config.optimizer.groups = groups(keys["mixer"])
    read(config, chosen, sizes, {key: value for key, value in keys.items() if key in FIELDS[chosen]})
    return finish(config, f"domains-{chosen}-{'bi-' if keys['bi'] else ''}{keys['mixer']}", "small")


def read(config: ConfigDict, chosen: str, sizes: dict[str, Any], fields: dict[str, Any]) -> None:
    """Sets data, input, head and training of a preset, in place; the mixer is that of the config.

    Args:
        sizes: as of SIZES, with those of USUAL.
        fields: of the data, in place of those of FIELDS.
    """
    config.data = DOMAIN_DATA.defaults(name=NAMES.get(chosen, chosen))
    config.data.domain = FIELDS[chosen] | fields
    domain = config.data.domain
    config.seq_len, config.batch_size, config.steps = sizes["length"], sizes["batch_size"], sizes["steps"]
    for field in ("input", "head", "pool", "dropout"):
        config.model[field] = sizes[field]
    if chosen == "electricity":
        config.model.head, config.model.window_norm = FORMS[domain.form], domain.form != "recurrent"
        config.model.horizon = domain.horizon if domain.form == "window" else 1
        config.seq_len = row_length(domain.form, domain.lookback, domain.horizon)
    config.model.observed = bool(domain.get("gaps") or domain.get("form") == "masked" or domain.get("missing"))
    config.optimizer.learning_rate, config.optimizer.weight_decay = sizes["learning_rate"], sizes["weight_decay"]
    config.evals = "figures,forecast" if domain.get("form") == "recurrent" else "figures"
    config.checkpoint.every = config.evaluation.every = max(config.steps // 4, 1)
    config.evaluation.rows = 1024
    config.metrics.every = 10
    config.metrics.tensorboard = False
    config.sample.prompt, config.sample.tokens = "", 0


def parse(arg: str) -> tuple[str, dict[str, Any]]:
    """The preset and its keys, `mixer` and `bi` included. Raises ValueError; it lists what there is."""
    first, *rest = arg.split(",")
    chosen = preset(first, list(FIELDS))
    types = KEYS | {name: type(value) for name, value in FIELDS[chosen].items()}
    keys: dict[str, Any] = {}
    for part in rest:
        key, equals, text = part.partition("=")
        if not equals or key not in types:
            raise ValueError(f"{part!r} is no key=value of {chosen}: keys are {', '.join(types)}")
        try:
            keys[key] = {"True": True, "False": False}[text] if types[key] is bool else types[key](text)
        except (ValueError, KeyError):
            allowed = "True or False" if types[key] is bool else types[key].__name__
            raise ValueError(f"{part}: must be {allowed}") from None
    own = OWN.get(chosen, {}) if "mixer" not in keys else {}
    if keys.get("form") == "recurrent":
        own = own | dict(bi=False)  # a model of the next value must not read ahead
    return chosen, dict(mixer="mamba", bi=False) | own | keys


def model(mixer: str, width: int, layers: int, bi: bool) -> ConfigDict:
    """`config.model` of another config's small preset at this size; with `bi` its mixers read in both directions."""
    from seqmodels.configs.synthetic import mixers

    if mixer not in (there := mixers()):
        raise ValueError(f"no mixer {mixer!r}: there are {', '.join(there)}, the configs of this folder")
    config = ConfigDict(importlib.import_module(f"seqmodels.configs.{mixer}").get_config().model.to_dict())
    config.width = width
    config.repeats = max(layers // len(pattern.parse(config.pattern)), 1)
    if bi:
        config.pattern = both_ways(config.pattern)
    return config


def fit_system(model: ConfigDict, mixer: str, sizes: dict[str, Any]) -> None:
    """Step sizes of a fresh state space model and the state of S5, in place, where those of its config do not suit."""
    if mixer in SLOW and "dt" in sizes:
        model[mixer].dt_min, model[mixer].dt_max = sizes["dt"]
    if mixer == "s5" and "state" in sizes:
        model.s5.state = sizes["state"]


def groups(mixer: str) -> str:
    """`config.optimizer.groups` of a mixer."""
    return "ssm=0.25" if mixer in SLOW else ""


CHANNELS = ("mlp", "moe", "rwkv_channel")  # branches that mix no time


def both_ways(text: str) -> str:
    """A pattern whose mixers of time read in both directions."""
    return " ".join(
        "+".join("|".join(word if word in CHANNELS else f"bi:{word}" for word in step) for step in block)
        for block in pattern.parse(text)
    )


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Learning rates. Each trial is a dict of dotted fields."""
    config = get_config(arg)
    for factor in (0.1, 0.3, 1.0, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})


def sweep_mixers(add: Callable[[dict], None], arg: str | None = None) -> None:
    """The models of COMPARED on one preset: each a trial of the fields in which it differs from the config's."""
    config, (chosen, _) = get_config(arg), parse(arg or DEFAULT)
    mine, layers = flat(config.model), config.model.repeats * len(pattern.parse(config.model.pattern))
    ahead = config.model.head not in ("next_token", "next_value")  # which must not see what they predict
    for mixer, bi in (each for each in COMPARED if ahead or not each[1]):
        other = model(mixer, config.model.width, layers, bi)
        fit_system(other, mixer, SIZES[chosen])
        theirs = flat(other)
        fields = {name: value for name, value in theirs.items() if value != mine.get(name) and name not in READ}
        fields["pattern"] = theirs["pattern"]  # also where it is the config's: it names the trial
        add({"optimizer.groups": groups(mixer)} | {f"model.{name}": value for name, value in fields.items()})


READ = ("input", "head", "pool", "dropout", "horizon", "window_norm", "observed")  # fields of a model that `read` sets


def flat(part: ConfigDict) -> dict[str, Any]:
    """Dotted fields of `config.model` or of a part of it."""
    found: dict[str, Any] = {}
    for name, value in part.items():
        found |= {f"{name}.{k}": v for k, v in flat(value).items()} if isinstance(value, ConfigDict) else {name: value}
    return found


SWEEPS = {"mixers": sweep_mixers}
