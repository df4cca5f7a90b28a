"""Classification: given several continuations of a text, does the model find the right one the likeliest?

The data are JSON lines. Each is an object with `prompt` (str), `choices` (list of str; each begins with the space that
separates it from the prompt) and `answer` (index of the right choice).
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from seqmodels.backbone import context
from seqmodels.data.tokenizer import Tokenizer
from seqmodels.errors import UserError
from seqmodels.evals import likelihood
from seqmodels.evals.lines import read_lines
from seqmodels.evals.run import Run
from seqmodels.globs import matching

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEFAULT = Path(__file__).with_name("tasks") / "endings.jsonl"


class Example(NamedTuple):
    """One line of a file."""

    prompt: str
    choices: list[str]
    answer: int


def read(path: Path, limit: int | None = None) -> list[Example]:
    """The first `limit` examples of a file. Raises: UserError that names a line that is no example."""
    return read_lines(path, _example, limit, field="config.evaluation.classification", kind="example")


def _example(line: str, where: str) -> Example:
    try:
        fields = json.loads(line)
        prompt, choices, answer = fields["prompt"], fields["choices"], fields["answer"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where}: must be a JSON object with prompt, choices and answer") from None
    if not isinstance(prompt, str) or not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise UserError(f"{where}: prompt must be a string, choices a list of strings")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(f"{where}: answer={answer!r}: must be the index of one of the {len(choices)} choices")
    return Example(prompt, choices, answer)


def files(config: ConfigDict) -> list[Path]:
    """Files that `config.evaluation.classification` names. Raises: UserError where there are none."""
    pattern = config.evaluation.get("classification", "")
    paths = matching(pattern) if pattern else [DEFAULT]
    if not paths:
        raise UserError(f"config.evaluation.classification={pattern!r}: matches no file")
    return paths


def figures(examples: list[Example], nats: list[np.ndarray]) -> dict[str, float | int]:
    """Shares of right answers.

    Args:
      nats: of each example, [choices] nats of each choice after the prompt.

    Returns:
      accuracy: share of examples whose answer has the fewest nats. accuracy_norm: whose answer has the fewest nats for
      each byte (UTF-8). stderr: standard error of the accuracy. chance: accuracy of guessing. examples: their number.
    """
    sizes = [np.array([len(choice.encode()) for choice in example.choices]) for example in examples]
    right = [np.argmin(n) == example.answer for n, example in zip(nats, examples, strict=True)]
    right_norm = [np.argmin(n / s) == e.answer for n, s, e in zip(nats, sizes, examples, strict=True)]
    accuracy = float(np.mean(right))
    return dict(
        accuracy=accuracy,
        accuracy_norm=float(np.mean(right_norm)),
        stderr=math.sqrt(accuracy * (1 - accuracy) / len(examples)),
        chance=float(np.mean([1 / len(example.choices) for example in examples])),
        examples=len(examples),
    )


def evaluate(
    model: nn.Module, params: Any, tokenizer: Tokenizer, examples: list[Example], **options: Any
) -> dict[str, float | int]:
    """`figures` of a model. Further arguments are those of `seqmodels.evals.likelihood.score`."""
    pairs = [(example.prompt, choice) for example in examples for choice in example.choices]
    requests = likelihood.continuations(tokenizer, pairs, options.get("context"))
    scores = iter(likelihood.score(model, params, requests, **options))
    return figures(examples, [np.array([next(scores).nats for _ in example.choices]) for example in examples])


def check(config: ConfigDict) -> None:
    """Raises UserError for files that cannot serve, before anything is compiled."""
    for path in files(config):
        read(path)


def evaluate_run(run: Run, splits: list[str], limit: int | None) -> dict:
    """The figures of each file, by its name without ending; `limit` counts examples of each."""
    options = dict(piece=run.config.seq_len, batch_size=run.batch_size, context=context(run.config), mesh=run.mesh)
    return {
        "classification": {
            path.stem: evaluate(run.model, run.params, run.dataset.tokenizer, read(path, limit), **options)
            for path in files(run.config)
        }
    }


def table(result: dict) -> str:
    lines = [f"{'task':<20}{'accuracy':>16}{'a byte':>10}{'chance':>10}{'examples':>10}"]
    for name, values in result["classification"].items():
        accuracy = f"{values['accuracy']:.4f} ±{values['stderr']:.4f}"
        lines.append(
            f"{name:<20}{accuracy:>16}{values['accuracy_norm']:>10.4f}{values['chance']:>10.4f}{values['examples']:>10,}"
        )
    return "\n".join(lines)


def plot(axes: "Axes", result: dict) -> None:
    by_name = result["classification"]
    for place, values in enumerate(by_name.values()):
        axes.barh(place, values["accuracy"], xerr=values["stderr"], color="tab:blue", height=0.6)
        axes.plot([values["chance"]] * 2, [place - 0.4, place + 0.4], "k--")
    axes.set_yticks(range(len(by_name)), by_name)
    axes.set(xlim=(0, 1), xlabel="accuracy (dashed: chance)", title="classification")
    axes.invert_yaxis()
