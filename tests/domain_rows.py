"""Domains as datasets, and all their rows."""

import numpy as np

from seqmodels import data
from seqmodels.fields.run import DOMAIN_DATA


def load(name, length, path="", batch_size=4, seed=0, cache="data", unread=False, half_rate=0.0, **fields):
    """The domain `name` as a dataset; `unread`: as for a plan."""
    config = DOMAIN_DATA.defaults(name=name, path=str(path), cache=str(cache), half_rate=half_rate)
    config.domain = fields
    return (data.load_unread if unread else data.load)(config, seq_len=length, batch_size=batch_size, seed=seed)


def rows(dataset, split):
    """All rows of a split that count, in order."""
    batches = list(dataset[split].batches(7))
    found = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return {name: array[: dataset.splits[split].count] for name, array in found.items()}
