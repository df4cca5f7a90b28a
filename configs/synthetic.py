"""Synthetic tasks: can a mixer remember, recall, count, compute? Rows are generated on the fly (docs/synthetic.md).

Command:   python train.py --config=configs/synthetic.py:mqar,mixer=densemamba
Hardware:  2 CPU cores, minutes; the presets with the name of a paper need one GPU.

The argument is `preset[,key=value...]`. FIELDS and PAPERS below list the presets. The keys are `mixer` (any other
config of this folder), `length`, `width`, `layers`, and the fields of the task. All other settings are flags, such as
--config.steps=500.
"""

import importlib
import pathlib
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from ml_collections import ConfigDict

from seqmodels import pattern
from seqmodels.configs.base import base, finish, preset
from seqmodels.configs.trials import Trial, product, vary
from seqmodels.fields.mlp import MLP
from seqmodels.fields.model import DENSE
from seqmodels.fields.run import TASK_DATA

MIXERS = (  # the configs that a sweep compares
    "mamba", "densemamba", "mamba2", "mamba3", "gla", "retnet", "linear_attention", "performer", "transformer",
)  # fmt: skip

# Mixers without a convolution of their own get this one before each (docs/synthetic.md), as in Zoology and Based
SHORT_CONV = 4
CONVOLVED = ("denseretnet", "gla", "linear_attention", "mixtral", "performer", "retnet", "transformer")

DEFAULT = "mqar"
RATES = (1e-4, 4.6e-4, 2.2e-3, 1e-2)  # learning rates of Zoology

# Fields of each task (seqmodels/data/synthetic/<task>.py) with their values in its small preset
FIELDS: dict[str, dict[str, Any]] = {
    "copying": dict(vocab=16, tokens=4),
    "selective_copying": dict(vocab=16, tokens=4),
    "induction": dict(vocab=8),
    "recall": dict(vocab=11),
    "mqar": dict(
        vocab=32,
        shapes=((16, 2, 1.0), (32, 4, 1.0)),
        test_shapes=((16, 2), (32, 4), (64, 8)),
        power=0.01,
        random_filler=False,
    ),
    "parity": dict(ask="last", shortest=3),
    "majority": dict(ask="last", shortest=3),
    "modular_arithmetic": dict(modulus=5, brackets=False, operators="+-*", shortest=3),
    "word_problem": dict(group="s3", shortest=2),
    "listops": dict(depth=4, arguments=5, shortest=10, longest=100),
    "passkey": dict(depth=-1.0),
    "in_context_recall": dict(vocab=16, noise_vocab=0, noise=0.0),
    "fuzzy_recall": dict(vocab=16, longest=3, shortest=1),
    "memorization": dict(vocab=64, map_seed=12345),
    "compression": dict(vocab=16),
    "regular_language": dict(vocab=8, most_states=5, edges=2, longest=9),
    "string_copy": dict(ask="copy", letters=26, shortest=1, gram=2, follow=2),
    "transduction": dict(language="reverse", shortest=1),
}
HEADS = {"compression": "rebuild"}  # of tasks whose answers are not read at their places
# Sizes of each task. lengths: row lengths at which a trained model is measured too.
SIZES: dict[str, dict[str, Any]] = {
    "copying": dict(length=32),
    "selective_copying": dict(length=32),
    "induction": dict(length=32, steps=400, lengths=tuple(2**i for i in range(5, 12))),
    "recall": dict(length=18),
    "mqar": dict(length=32, batch_size=64),
    "parity": dict(length=17, lengths=(17, 33, 65, 129)),
    "majority": dict(length=17, lengths=(17, 33, 65, 129)),
    "modular_arithmetic": dict(length=18, lengths=(18, 34, 66, 130)),
    "word_problem": dict(length=10, lengths=(10, 20, 40, 80)),
    "listops": dict(length=100),
    "passkey": dict(length=64, lengths=(64, 128, 256, 512)),
    "in_context_recall": dict(length=63, lengths=(63, 127, 255)),
    "fuzzy_recall": dict(length=64, lengths=(64, 128)),
    "memorization": dict(length=32),
    "compression": dict(length=8, lengths=()),
    "regular_language": dict(length=96, lengths=(96, 192)),
    "string_copy": dict(length=34, lengths=(34, 66, 130)),
    "transduction": dict(length=21, lengths=(21, 41, 81)),
}
SMALL: dict[str, Any] = dict(batch_size=32, steps=1000, learning_rate=1e-2, embedding_std=0.3)
TWO_POWERS = tuple(2**i for i in range(6, 21))
ZOOLOGY: dict[str, Any] = dict(batch_size=512, steps=12_500, width=128)  # 64 epochs of 100,000 rows
# Poli et al. 2024: 200 epochs of 12,800 rows (here each row is new), two mixers with SwiGLUs, the middle of three rates
MAD: dict[str, Any] = dict(batch_size=128, steps=20_000, width=128, layers=2, learning_rate=5e-4, length=127)
PAPERS: dict[str, dict[str, Any]] = {
    "in_context_recall-mad": MAD | dict(task=dict(vocab=16), lengths=(127, 255, 511, 1023)),
    "in_context_recall-mad_noisy": MAD | dict(task=dict(vocab=32, noise_vocab=16, noise=0.2), lengths=(127, 255, 511)),
    "fuzzy_recall-mad": MAD | dict(length=128, lengths=(128, 256)),
    "memorization-mad": MAD | dict(task=dict(vocab=256), length=32),
    "compression-mad": MAD | dict(length=32),
    "selective_copying-mad": MAD | dict(task=dict(vocab=16, tokens=16), length=256),
    # Akyurek et al. 2024: 200 epochs of up to 40,000 automata, of about 370 tokens each; here each row has a new one
    "regular_language-regbench": dict(
        task=dict(vocab=18, most_states=12, edges=3, longest=49),
        length=384,
        lengths=(384, 768),
        batch_size=32,
        steps=50_000,
        width=128,
        layers=8,
        learning_rate=5e-4,
    ),
    # Deletang et al. 2023: inputs of 1 to 40 symbols in training and up to 500 in the test; the model's size is ours
    "transduction-chomsky": dict(
        length=80, lengths=(100, 200, 500, 1000), batch_size=128, steps=100_000, width=256, layers=5, learning_rate=1e-3
    ),
    # Gu and Dao 2023, appendix E.1; the learning rate of induction is ours
    "selective_copying-mamba": dict(
        task=dict(vocab=16, tokens=16),
        length=4112,
        batch_size=64,
        steps=400_000,
        learning_rate=1e-4,
        schedule="constant",
    ),
    "induction-mamba": dict(
        task=dict(vocab=16),
        length=256,
        lengths=TWO_POWERS,
        batch_size=8,
        steps=25 * 8192,
        learning_rate=1e-3,
        schedule="constant",
    ),
    # Arora et al. 2023, figure 2: learning rates 1e-4 to 1e-2, widths 64 to 512
    "mqar-zoology64": ZOOLOGY | dict(task=dict(vocab=8192, shapes=((64, 4, 1.0),), test_shapes=()), length=64),
    "mqar-zoology128": ZOOLOGY | dict(task=dict(vocab=8192, shapes=((128, 8, 1.0),), test_shapes=()), length=128),
    "mqar-zoology256": ZOOLOGY
    | dict(task=dict(vocab=8192, shapes=((256, 16, 1.0),), test_shapes=()), length=256, batch_size=256, steps=25_000),
    "mqar-zoology512": ZOOLOGY
    | dict(task=dict(vocab=8192, shapes=((512, 64, 1.0),), test_shapes=()), length=512, batch_size=128, steps=50_000),
    # Arora et al. 2024, figure 2: learning rates 1e-3 to 3e-2; 32 epochs of 180,000 rows
    "mqar-based": dict(
        task=dict(
            vocab=8192,
            shapes=((64, 4, 100.0), (128, 8, 20.0), (256, 16, 20.0), (256, 32, 20.0), (256, 64, 20.0)),
            test_shapes=((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)),
        ),
        length=256,
        batch_size=256,
        steps=22_500,
        width=128,
    ),
    # Tay et al. 2020, with the sizes of the S4 repository
    "listops-lra": dict(
        task=dict(depth=10, arguments=10, shortest=500, longest=2000),
        length=2048,
        batch_size=32,
        steps=120_000,
        width=256,
        layers=6,
    ),
    # Merrill et al. 2024
    "word_problem-s5": dict(task=dict(group="s5"), steps=20_000, width=512, batch_size=256, learning_rate=1e-4),
    "word_problem-a5": dict(task=dict(group="a5"), steps=20_000, width=512, batch_size=256, learning_rate=1e-4),
    "word_problem-z60": dict(task=dict(group="z60"), steps=20_000, width=512, batch_size=256, learning_rate=1e-4),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `preset[,key=value...]`, locked. Raises ValueError if a preset, key or value does not exist."""
    chosen, keys = parse(arg or DEFAULT)
    task = chosen.partition("-")[0]
    sizes: dict[str, Any] = dict(
        width=64, layers=2, learning_rate=3e-3, schedule="cosine", lengths=(), embedding_std=0.02
    )
    sizes |= SIZES[task] | PAPERS[chosen] if chosen in PAPERS else SMALL | SIZES[task]
    fields = FIELDS[task] | sizes.pop("task", {})
    sizes |= {key: value for key, value in keys.items() if key in ("length", "width", "layers")}
    fields |= {key: value for key, value in keys.items() if key in fields}

    config = base()
    config.seq_len, config.batch_size, config.steps = sizes["length"], sizes["batch_size"], sizes["steps"]
    config.model = model(keys["mixer"], sizes["width"], sizes["layers"])
    config.model.embedding_std = sizes["embedding_std"]
    if task in HEADS:
        config.model.head = HEADS[task]
    config.data = TASK_DATA.defaults(name=task, lengths=sizes["lengths"])
    config.data.task = fields
    config.optimizer.learning_rate, config.optimizer.schedule = sizes["learning_rate"], sizes["schedule"]
    config.evals = "accuracy,needle" if task == "passkey" else "accuracy"
    config.checkpoint.every = config.evaluation.every = max(config.steps // 10, 1)
    config.evaluation.rows = 128
    config.metrics.every = 10
    config.metrics.tensorboard = False
    config.sample.prompt, config.sample.tokens = "", 0
    return finish(config, f"synthetic-{chosen}-{keys['mixer']}", "small")


def parse(arg: str) -> tuple[str, dict]:
    """The preset and its keys, including `mixer`. Raises ValueError; it suggests a similar name and lists all."""
    first, *rest = arg.split(",")
    chosen = preset(first, [*FIELDS, *PAPERS])
    task = FIELDS[chosen.partition("-")[0]]
    types: dict[str, type] = dict(mixer=str, length=int, width=int, layers=int)
    types |= {name: type(value) for name, value in task.items() if not isinstance(value, tuple)}
    keys: dict[str, Any] = {"mixer": "mamba"}
    for part in rest:
        key, equals, text = part.partition("=")
        if not equals or key not in types:
            raise ValueError(f"{part!r} is no key=value of {chosen}: {_nearest(key, types)}keys are {', '.join(types)}")
        try:
            keys[key] = {"True": True, "False": False}[text] if types[key] is bool else types[key](text)
        except (ValueError, KeyError):
            raise ValueError(
                f"{part}: must be {'True or False' if types[key] is bool else types[key].__name__}"
            ) from None
    if keys["mixer"] not in (there := mixers()):
        raise ValueError(
            f"no mixer {keys['mixer']!r}: {_nearest(keys['mixer'], there)}there are {', '.join(there)}, "
            "the configs of this folder"
        )
    return chosen, keys


def mixers() -> list[str]:
    """Configs of this folder, each of which has a model."""
    mine = pathlib.Path(__file__)
    others = ("__init__", "base", "domains", "lra", "trials", mine.stem)
    return sorted(path.stem for path in mine.parent.glob("*.py") if path.stem not in others)


def model(mixer: str, width: int, layers: int) -> ConfigDict:
    """`config.model` of another config's small preset at this size, with the fields of MIXERS for a sweep to choose."""
    chosen = ConfigDict(_small(mixer).to_dict())
    for other in MIXERS:
        for name, value in _small(other).items():
            if isinstance(value, ConfigDict) and name not in chosen:
                chosen[name] = ConfigDict(value.to_dict())
    chosen.width = width
    chosen.repeats = max(layers // len(pattern.parse(chosen.pattern)), 1)
    if "attention" in pattern.names(chosen.pattern):
        chosen.attention.init_std = 0.0  # as the other mixers begin; at these widths attention hardly learns from 0.02
    chosen.short_conv = SHORT_CONV if mixer in CONVOLVED else 0
    chosen.mlp = MLP.defaults()  # the same for all: SwiGLU, 8/3 of the width
    if "moe" in chosen:
        chosen.moe.hidden = 0  # the same
    return chosen


def _small(mixer: str) -> ConfigDict:
    return importlib.import_module(f"seqmodels.configs.{mixer}").get_config().model


def _nearest(word: str, choices) -> str:
    near = get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}? " if near else ""


def trials_of(arg: str | None) -> list[Trial]:
    """A trial for each of MIXERS: the fields in which its model differs from that of `arg`, except the sizes."""
    mine = _fields(parse(arg or DEFAULT)[1]["mixer"])
    trials = []
    for mixer in MIXERS:
        always = ("pattern", "dense.variant")  # so that every trial says what it is
        fields = {name: value for name, value in _fields(mixer).items() if not _as_before(name, value)}
        other = {name: value for name, value in fields.items() if name in always or value != mine.get(name)}
        trials.append({f"model.{name}": value for name, value in other.items()})
    return trials


def _as_before(name: str, value: object) -> bool:
    """Whether this is a later field of the dense links at its default. Trials leave it out, and so keep their names."""
    field = DENSE.fields.get(name.removeprefix("dense."))
    return name.startswith("dense.") and field is not None and field.since > 1 and value == field.default


def _fields(mixer: str) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in model(mixer, 0, 0).items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, ConfigDict) else {name: value}
    return {name: value for name, value in flat.items() if name not in ("width", "repeats")}


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """The mixers at one task and size. Each trial is a dict of dotted fields."""
    for trial in trials_of(arg):
        add(trial)


def sweep_widths(add: Callable[[dict], None], arg: str | None = None) -> None:
    """The mixers at several widths: accuracy against the bytes of state."""
    for trial in product(trials_of(arg), vary("model.width", 32, 64, 128)):
        add(trial)


def sweep_rates(add: Callable[[dict], None], arg: str | None = None) -> None:
    """The mixers at the learning rates of Zoology, because recall depends much on them."""
    for trial in product(trials_of(arg), vary("optimizer.learning_rate", *RATES)):
        add(trial)


def sweep_own_rates(add: Callable[[dict], None], arg: str | None = None) -> None:
    """The mixer of `arg` alone, at those rates: before it is said that a mixer cannot learn a task."""
    for trial in vary("optimizer.learning_rate", *RATES):
        add(trial)


def sweep_two_rates(add: Callable[[dict], None], arg: str | None = None) -> None:
    """The mixers at two learning rates, because some mixers need the higher and some the lower one."""
    for trial in product(vary("optimizer.learning_rate", 1e-2, 2e-3), trials_of(arg)):
        add(trial)


def sweep_miniature(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Two mixers for a few steps. This shows that a sweep works up to its table."""
    for trial in product(trials_of(arg)[:2], [{"steps": 20, "data.rows": 32, "data.lengths": ()}]):
        add(trial)


SWEEPS = {
    "mixers": sweep,
    "widths": sweep_widths,
    "rates": sweep_rates,
    "own_rates": sweep_own_rates,
    "two_rates": sweep_two_rates,
    "miniature": sweep_miniature,
}
