"""Data beyond text: images, series, DNA, sound (docs/domains.md). One config trains any mixer on any of them.

Command:   python train.py --config=configs/domains.py:digits,mixer=mamba
Hardware:  2 CPU cores for digits; one GPU for long rows.

The argument is `preset[,key=value...]`. The keys are `mixer` (any other config of this folder), `bi` (True: the mixers
read in both directions), `width`, `layers`, and the fields of the data. All other settings are flags, such as
--config.steps=500.
"""

import importlib
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from seqmodels import pattern
from seqmodels.configs.base import base, finish, preset
from seqmodels.fields.run import DOMAIN_DATA

# Fields of each domain (seqmodels/data/domains) with their values in its preset
FIELDS: dict[str, dict[str, Any]] = {
    "digits": dict(split="last", validation=0.1),
    "mnist5k": dict(permuted=False, validation=0.1),
    "forda": dict(set="FordA", ending="tsv", validation=0.1),
    "electricity": dict(file="vic_elec.csv", columns="Demand,Temperature", lookback=96, horizon=96, season=48),
}
NAMES = {"forda": "series"}  # presets whose domain has another name
# Sizes of each preset: the row's length in steps, and what a training run takes
SIZES: dict[str, dict[str, Any]] = {
    "digits": dict(length=64),
    "mnist5k": dict(length=784, steps=3000),
    "forda": dict(length=500, steps=2000),
    "electricity": dict(length=96, head="window", pool="last", steps=3000),
}
USUAL: dict[str, Any] = dict(
    batch_size=32, steps=1000, width=64, layers=2, learning_rate=3e-3, input="frames", head="classify", pool="mean",
    dropout=0.1,
)  # fmt: skip
KEYS: dict[str, type] = dict(mixer=str, bi=bool, width=int, layers=int)


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `preset[,key=value...]`, locked. Raises ValueError if a preset, key or value does not exist."""
    chosen, keys = parse(arg or "digits")
    sizes = USUAL | SIZES[chosen] | {key: keys[key] for key in ("width", "layers") if key in keys}
    config = base()
    config.model = model(keys["mixer"], sizes["width"], sizes["layers"], keys["bi"])
    read(config, chosen, sizes, {key: value for key, value in keys.items() if key in FIELDS[chosen]})
    name = f"domains-{chosen}-{'bi-' if keys['bi'] else ''}{keys['mixer']}"
    return finish(config, name, "small")


def read(config: ConfigDict, chosen: str, sizes: dict[str, Any], fields: dict[str, Any]) -> None:
    """Sets data, input, head and training of a preset, in place; the mixer is that of the config."""
    config.data = DOMAIN_DATA.defaults(name=NAMES.get(chosen, chosen))
    config.data.domain = FIELDS[chosen] | fields
    config.seq_len, config.batch_size, config.steps = sizes["length"], sizes["batch_size"], sizes["steps"]
    config.model.input, config.model.head, config.model.pool = sizes["input"], sizes["head"], sizes["pool"]
    config.model.dropout = sizes["dropout"]
    if "horizon" in FIELDS[chosen]:
        config.model.horizon = config.data.domain.horizon
        config.model.window_norm = True
    config.optimizer.learning_rate = sizes["learning_rate"]
    config.optimizer.weight_decay = 0.05
    config.evals = "figures"
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
    keys: dict[str, Any] = dict(mixer="mamba", bi=False)
    for part in rest:
        key, equals, text = part.partition("=")
        if not equals or key not in types:
            raise ValueError(f"{part!r} is no key=value of {chosen}: keys are {', '.join(types)}")
        try:
            keys[key] = {"True": True, "False": False}[text] if types[key] is bool else types[key](text)
        except (ValueError, KeyError):
            allowed = "True or False" if types[key] is bool else types[key].__name__
            raise ValueError(f"{part}: must be {allowed}") from None
    return chosen, keys


def model(mixer: str, width: int, layers: int, bi: bool) -> ConfigDict:
    """`config.model` of another config's small preset at this size."""
    from seqmodels.configs.synthetic import mixers

    if mixer not in (there := mixers()):
        raise ValueError(f"no mixer {mixer!r}: there are {', '.join(there)}, the configs of this folder")
    config = ConfigDict(importlib.import_module(f"seqmodels.configs.{mixer}").get_config().model.to_dict())
    config.width = width
    config.repeats = max(layers // len(pattern.parse(config.pattern)), 1)
    if bi:
        config.pattern = both_ways(config.pattern)
    return config


def both_ways(text: str) -> str:
    """A pattern whose mixers of time read in both directions."""
    return " ".join(
        "+".join("|".join(word if word in CHANNELS else f"bi:{word}" for word in step) for step in block)
        for block in pattern.parse(text)
    )


CHANNELS = ("mlp", "moe", "rwkv_channel")  # branches that mix no time


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Learning rates. Each trial is a dict of dotted fields. Mixers are compared by a run for each."""
    config = get_config(arg)
    for factor in (0.1, 0.3, 1.0, 3.0):
        add({"optimizer.learning_rate": config.optimizer.learning_rate * factor})
