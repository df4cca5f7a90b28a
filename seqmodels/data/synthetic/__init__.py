"""Generated tasks, by name. A new task is a file here, a line in this table and a line in configs/synthetic.py.

A task is a frozen dataclass of settings (the fields of `config.data.task`) whose `rows` is a pure function of a random
generator. See docs/synthetic.md.
"""

import dataclasses

from ml_collections import ConfigDict

from seqmodels.data.synthetic.compression import Compression
from seqmodels.data.synthetic.copying import Copying, SelectiveCopying
from seqmodels.data.synthetic.dataset import SyntheticDataset
from seqmodels.data.synthetic.fuzzy_recall import FuzzyRecall
from seqmodels.data.synthetic.in_context_recall import InContextRecall
from seqmodels.data.synthetic.induction import Induction
from seqmodels.data.synthetic.listops import ListOps
from seqmodels.data.synthetic.majority import Majority
from seqmodels.data.synthetic.memorization import Memorization
from seqmodels.data.synthetic.modular_arithmetic import ModularArithmetic
from seqmodels.data.synthetic.mqar import Mqar
from seqmodels.data.synthetic.parity import Parity
from seqmodels.data.synthetic.passkey import Passkey
from seqmodels.data.synthetic.recall import AssociativeRecall
from seqmodels.data.synthetic.regular_language import RegularLanguage
from seqmodels.data.synthetic.string_copy import StringCopy
from seqmodels.data.synthetic.task import Rows, Task
from seqmodels.data.synthetic.transduction import Transduction
from seqmodels.data.synthetic.word_problem import WordProblem
from seqmodels.errors import UserError
from seqmodels.nearest import nearest

TASKS: dict[str, type[Task]] = {
    "copying": Copying,
    "selective_copying": SelectiveCopying,
    "induction": Induction,
    "recall": AssociativeRecall,
    "mqar": Mqar,
    "parity": Parity,
    "majority": Majority,
    "modular_arithmetic": ModularArithmetic,
    "word_problem": WordProblem,
    "listops": ListOps,
    "passkey": Passkey,
    "in_context_recall": InContextRecall,
    "fuzzy_recall": FuzzyRecall,
    "memorization": Memorization,
    "compression": Compression,
    "regular_language": RegularLanguage,
    "string_copy": StringCopy,
    "transduction": Transduction,
}
GOES_ON = ("induction", "recall", "passkey", "in_context_recall")  # all of whose next tokens are targets

__all__ = ["GOES_ON", "TASKS", "Rows", "SyntheticDataset", "Task", "load", "make_task"]


def make_task(name: str, settings: dict) -> Task:
    """The task `name` with these settings. Raises UserError for a name, field or value that is not allowed."""
    if name not in TASKS:
        raise UserError(f"config.data.name={name!r}: must be one of {', '.join(TASKS)}{nearest(name, list(TASKS))}")
    fields = [field.name for field in dataclasses.fields(TASKS[name])]
    for field in settings:
        if field not in fields:
            raise UserError(f"config.data.task.{field}: {name} has no such field; its fields are {', '.join(fields)}")
    return TASKS[name](**{field: _frozen(value) for field, value in settings.items()})


def load(config: ConfigDict, *, seq_len: int, batch_size: int, seed: int = 0, bptt: bool = False) -> SyntheticDataset:
    """The dataset of `config.data` with a `task`. Arguments and errors as `seqmodels.data.load`."""
    task = make_task(config.name, dict(config.task))
    task.check(seq_len)
    if bptt:
        raise UserError(f"config.training.bptt={bptt}: must be False with a synthetic task, whose rows do not go on")
    if config.loss not in ("answers", "all"):
        raise UserError(f"config.data.loss={config.loss!r}: must be one of 'answers', 'all'")
    if config.loss == "all" and config.name not in GOES_ON:
        raise UserError(
            f"config.data.loss='all': must be 'answers' with {config.name}, which has no other targets; "
            f"{', '.join(GOES_ON)} have"
        )
    if config.rows < 1:
        raise UserError(f"config.data.rows={config.rows}: must be at least 1")
    if any(length < 1 for length in config.lengths):
        raise UserError(f"config.data.lengths={tuple(config.lengths)}: must be at least 1 each")
    return SyntheticDataset(task, seq_len, batch_size, seed, config.loss, config.rows, tuple(config.lengths))


def _frozen(value):
    """Lists, which JSON makes of tuples, become tuples again."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
