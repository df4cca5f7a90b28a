"""Data beyond text, by name: images, series, DNA, sound. A new domain is a file here and a line in DOMAINS.

A domain is a frozen dataclass of settings (the fields of `config.data.domain`) that reads the rows of each split. See
docs/domains.md.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from seqmodels.data.domains.dataset import DomainDataset, DomainSplit
from seqmodels.data.domains.digits import Digits
from seqmodels.data.domains.dna import Bases, Species
from seqmodels.data.domains.domain import Domain
from seqmodels.data.domains.electricity import Electricity
from seqmodels.data.domains.files import Place
from seqmodels.data.domains.listops import ListOps
from seqmodels.data.domains.mnist import Mnist5k
from seqmodels.data.domains.pathfinder import Pathfinder
from seqmodels.data.domains.pendulum import Pendulum
from seqmodels.data.domains.series import Series
from seqmodels.data.domains.sound import Sound
from seqmodels.data.domains.texts import TextPairs, Texts
from seqmodels.data.domains.tfds import Cifar10, ImdbReviews, Mnist, SpeechCommands
from seqmodels.data.domains.waves import Waves
from seqmodels.errors import UserError
from seqmodels.nearest import nearest

DOMAINS: dict[str, type[Domain]] = {
    "digits": Digits,
    "mnist5k": Mnist5k,
    "series": Series,
    "electricity": Electricity,
    "pathfinder": Pathfinder,
    "pendulum": Pendulum,
    "listops": ListOps,
    "bases": Bases,
    "species": Species,
    "sound": Sound,
    "waves": Waves,
    "texts": Texts,
    "text_pairs": TextPairs,
    "mnist": Mnist,
    "cifar10": Cifar10,
    "speech_commands": SpeechCommands,
    "imdb_reviews": ImdbReviews,
}

__all__ = ["DOMAINS", "Domain", "DomainDataset", "DomainSplit", "load", "make_domain"]


def make_domain(name: str, settings: Mapping[str, Any]) -> Domain:
    """The domain `name` with these settings. Raises UserError for a name, field or value that is not allowed."""
    if name not in DOMAINS:
        raise UserError(f"config.data.name={name!r}: there are no such data{nearest(name, list(DOMAINS))}")
    types = {field.name: type(field.default) for field in dataclasses.fields(DOMAINS[name])}
    for field, value in settings.items():
        place = f"config.data.domain.{field}={value!r}"
        if field not in types:
            raise UserError(f"{place}: {name} has no such field; its fields are {', '.join(types)}")
        if type(value) is not types[field] and not (types[field] is float and type(value) is int):
            raise UserError(f"{place}: must be of the type {types[field].__name__}")
    return DOMAINS[name](**settings)


def load(
    config: ConfigDict, *, seq_len: int, batch_size: int, seed: int = 0, bptt: bool = False, unread: bool = False
) -> DomainDataset:
    """The dataset of `config.data` with a `domain`. Arguments and errors as `seqmodels.data.load`.

    With `unread` the rows may be others, of the same shapes (`Domain.unread`).
    """
    domain = make_domain(config.name, dict(config.domain))
    if bptt:
        raise UserError(f"config.training.bptt={bptt}: must be False with data.name={config.name!r}, whose rows end")
    place = Place(config.name, config.path, Path(config.cache).expanduser())
    splits = domain.unread(place, seq_len) if unread else domain.splits(place, seq_len)
    dataset = DomainDataset(config.name, domain, splits, seq_len, batch_size, seed)
    if not config.half_rate:
        return dataset
    if not dataset.evenly_sampled:
        raise UserError(
            f"config.data.half_rate={config.half_rate}: must be 0 with data.name={config.name!r}, whose rows are no "
            "signals at equal distances in time with one answer each"
        )
    return dataclasses.replace(dataset, half_rate=config.half_rate)
