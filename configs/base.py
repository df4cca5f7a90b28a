"""Functions that all configs use: the fields of a run, two ways to train, and names of presets.

A config file calls `base()`, adds the options of its branches, applies its preset, and returns the result of `finish`.
Nothing here uses a device or imports JAX. The only import from the library is `seqmodels.fields`.
"""

from collections.abc import Iterable
from difflib import get_close_matches

from ml_collections import ConfigDict

from seqmodels.fields.run import defaults


def base() -> ConfigDict:
    """Every field of a run with its default, unlocked. `seqmodels/fields/run.py` and `model.py` declare the fields.

    A config adds the options of its branches, such as `config.model.mamba = MAMBA.defaults()`.
    """
    return defaults()


def large(config: ConfigDict, *, learning_rate: float, steps: int, remat: str) -> None:
    """Sets the training of the Mamba paper's language models, in place.

    Batches have 0.5 M tokens. AdamW (0.9, 0.95) has weight decay 0.1 and clip 1. The learning rate falls along a cosine
    from five times GPT-3's rate to 1e-5, after GPT-3's 375 M tokens of warm-up. Micro-batches of 8 rows are for one GPU
    of 80 GB: with more devices lower `training.accumulate`. For other text set `data.name` and `data.tokenizer`. The
    vocabulary has room for the 50,277 ids of the GPT-NeoX tokenizer, and also for the default's bytes.
    """
    config.steps = steps
    config.batch_size = 256
    config.seq_len = 2048
    config.training.accumulate = 32
    config.model.vocab_size = 50280
    config.model.dtype = "bfloat16"
    config.model.remat = remat
    config.optimizer.learning_rate = learning_rate
    config.optimizer.floor = 1e-5 / learning_rate
    config.optimizer.warmup = 715.0
    config.checkpoint.every = 500
    config.evaluation.every = 500
    config.evaluation.batch_size = 8
    config.metrics.every = 10
    config.metrics.norms = False


def short(config: ConfigDict, *, learning_rate: float) -> None:
    """Sets the training of 25 M parameters in half a minute of one H200, in place: for ablations with several seeds.

    A run has 23 M tokens, so use a text of this size (benchmarks/rfc_prose.py makes one), by `data.name`, `data.path`
    and `data.tokenizer`. The vocabulary has room for 8,192 ids, and also for the default's bytes. There is one
    checkpoint, at the end.
    """
    config.steps = 700
    config.batch_size = 32
    config.seq_len = 1024
    config.model.vocab_size = 8192
    config.model.dtype = "bfloat16"
    config.optimizer.learning_rate = learning_rate
    config.optimizer.warmup = 0.1
    config.checkpoint.every = config.steps
    config.checkpoint.keep = 1
    config.metrics.tensorboard = False
    config.sample.tokens = 0


def preset(arg: str | None, allowed: Iterable[str]) -> str:
    """Name of the preset in `--config=FILE.py:arg`; without `arg` it is "small".

    Raises ValueError if there is no such preset; the message suggests the most similar one and lists all.
    """
    allowed = list(allowed)
    name = arg or "small"
    if name not in allowed:
        near = get_close_matches(name, allowed, n=1, cutoff=0.3)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no preset {name!r}: {guess}presets are {', '.join(allowed)}")
    return name


def finish(config: ConfigDict, name: str, chosen: str) -> ConfigDict:
    """Names the config and locks its fields: after this only values can change."""
    config.name = name if chosen == "small" else f"{name}-{chosen}"
    return config.lock()
