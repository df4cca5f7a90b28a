"""Questions about a text: what a model writes after them, against reference answers.

The data are JSON lines. Each is an object with `question` (str), `answers` (list of str, any of which is right), and
perhaps `context` (str), `answer_prefix` (str, "Answer:" if it is left out) and `shots` (list of such objects, examples
that come first with their first answer). A prompt is, apart by empty lines, the shots and then

    context

    question
    answer_prefix

Lines of two published sets are read as they are: those of Based (Arora et al. 2024, arXiv 2402.18668; FDA, SWDE, SQuAD
completion) have `text`, which is the whole prompt, and `value`; those of L-Eval (An et al. 2023, arXiv 2307.11088) have
`input`, which is the context of all `instructions`, and their `outputs`.

Its answer is the first line that the model writes, greedily. Scores are those of SQuAD (Rajpurkar et al. 2016, arXiv
1606.05250): texts are compared in small letters, without punctuation and articles.
"""

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from seqmodels.backbone import context
from seqmodels.data.tokenizer import Tokenizer
from seqmodels.errors import UserError
from seqmodels.evals import likelihood
from seqmodels.evals.answers import answers
from seqmodels.evals.lines import read_lines
from seqmodels.evals.run import Run
from seqmodels.globs import matching

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STOP = "\n"
METRICS = ("contains", "share", "exact_match", "f1")


class Question(NamedTuple):
    """One line of a file; `shots` are questions, too, without shots of their own."""

    question: str
    answers: list[str]
    context: str = ""
    answer_prefix: str = "Answer:"
    shots: tuple["Question", ...] = ()


def read(path: Path, limit: int | None = None) -> list[Question]:
    """The first `limit` questions of a file. Raises: UserError that names a line that is no question."""
    lines = read_lines(path, _line, limit, field="config.evaluation.qa", kind="question")
    return [question for questions in lines for question in questions][:limit]


def _line(line: str, where: str) -> list[Question]:
    """The questions of a line: several only of L-Eval."""
    try:
        fields = json.loads(line)
    except ValueError:
        raise UserError(f"{where}: must be a JSON object with question and answers") from None
    if isinstance(fields, dict) and {"text", "value"} <= fields.keys():
        whole = _question(dict(question=fields["text"], answers=fields["value"], answer_prefix=""), where)
        return [whole._replace(question=whole.question.strip(), answers=[x.strip() for x in whole.answers])]
    if isinstance(fields, dict) and {"input", "instructions", "outputs"} <= fields.keys():
        asked, answers = _list(fields["instructions"]), _list(fields["outputs"])
        if not asked or len(asked) != len(answers):
            raise UserError(f"{where}: has {len(asked)} instructions and {len(answers)} outputs; must be as many")
        return [
            _question(dict(context=fields["input"], question=q, answers=[a]), where)
            for q, a in zip(asked, answers, strict=True)
        ]
    return [_question(fields, where)]


def _question(fields: Any, where: str) -> Question:
    if not isinstance(fields, dict) or not {"question", "answers"} <= fields.keys():
        raise UserError(f"{where}: must be a JSON object with question and answers")
    if unknown := fields.keys() - set(Question._fields):
        raise UserError(f"{where}: has the key {min(unknown)!r}; allowed are {', '.join(Question._fields)}")
    texts = [fields.get(name, "") for name in ("question", "context", "answer_prefix")] + _list(fields["answers"])
    if not fields["answers"] or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: question, context, answer_prefix and each of the answers must be a string")
    fields = fields | {"answers": _list(fields["answers"])}
    return Question(**fields | {"shots": tuple(_question(shot, where) for shot in _list(fields.get("shots", [])))})


def _list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def prompt_of(
    tokenizer: Tokenizer, question: Question, *, shots: int, repeat: int, length: int | None
) -> tuple[list[int], bool]:
    """Token ids of a prompt, which begins a document, and whether its context was cut.

    Args:
      shots: most examples. repeat: how often context and question are given, as "Just read twice" (Arora et al. 2024,
        arXiv 2407.05483) does.
      length: most tokens; the end of each context of the question is left out as far as that takes. None: any number.

    Raises: UserError if the prompt is longer without its context.
    """
    examples = "".join(f"{_text(shot)} {shot.answers[0]}\n\n" for shot in question.shots[:shots])
    start = [likelihood.begin(tokenizer), *tokenizer.encode(examples)]
    asked = question._replace(context="")
    ends = [
        tokenizer.encode("\n\n" * bool(question.context) + _text(asked) + "\n\n" * (n + 1 < repeat))
        for n in range(repeat)
    ]
    whole = tokenizer.encode(question.context)
    room = len(whole)
    if length is not None:
        room = min(room, (length - len(start) - sum(map(len, ends))) // repeat)
    if room < 0:
        raise UserError(f"a prompt without its context has more than {length} tokens: {question.question[:60]!r}")
    ids = start + [token for end in ends for token in [*whole[:room], *end]]
    return ids, room < len(whole)


def _text(question: Question) -> str:
    """A question without its answer."""
    asked = "\n".join(filter(None, [question.question, question.answer_prefix]))
    return "\n\n".join(filter(None, [question.context, asked]))


def normal(text: str) -> str:
    """Small letters, without punctuation, articles and repeated spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words; 0 if they share none."""
    ours, theirs = Counter(normal(answer).split()), Counter(normal(reference).split())
    return 2 * (ours & theirs).total() / max(ours.total() + theirs.total(), 1)


def scores(answer: str, references: list[str]) -> dict[str, float]:
    """From 0 to 1. contains: whether a reference is in the answer. share: share of the references that are, as in
    RULER (Hsieh et al. 2024, arXiv 2404.06654). exact_match, f1: of the best reference. The first two ignore case only.
    """
    found = [reference.lower() in answer.lower() for reference in references]
    best: Callable[[Callable[[str], float]], float] = lambda of: max(map(of, references))  # noqa: E731
    exact, overlap = best(lambda r: float(normal(answer) == normal(r))), best(lambda r: f1(answer, r))
    return dict(contains=float(any(found)), share=sum(found) / len(found), exact_match=exact, f1=overlap)


def evaluate(
    model: nn.Module,
    params: Any,
    tokenizer: Tokenizer,
    questions: list[Question],
    *,
    tokens: int,
    batch_size: int,
    shots: int = 0,
    repeat: int = 1,
    length: int | None = None,
) -> dict[str, Any]:
    """Means of `scores`, standard error of contains, the share of contexts that were cut, the number of questions, and
    the first three answers.

    Args:
      tokens: most tokens of an answer. The others are as for `prompt_of`.
    """
    prompts = [prompt_of(tokenizer, q, shots=shots, repeat=repeat, length=length) for q in questions]
    stops = [[STOP]] * len(prompts)
    ids = [prompt for prompt, _ in prompts]
    found = answers(model, params, tokenizer, ids, stops, tokens=tokens, batch_size=batch_size)
    rows = [scores(answer, question.answers) for answer, question in zip(found, questions, strict=True)]
    means = {name: float(np.mean([row[name] for row in rows])) for name in METRICS}
    error = math.sqrt(means["contains"] * (1 - means["contains"]) / len(rows))
    cut = float(np.mean([cut for _, cut in prompts]))
    return means | dict(stderr=error, cut=cut, examples=len(rows), answers=found[:3])


def files(config: ConfigDict) -> list[Path]:
    """Files that `config.evaluation.qa` names. Raises: UserError where there are none."""
    pattern = config.evaluation.get("qa", "")
    paths = matching(pattern) if pattern else []
    if not paths:
        raise UserError(f"config.evaluation.qa={pattern!r}: matches no file; it names JSON lines (docs/evaluation.md)")
    return paths


def check(config: ConfigDict) -> None:
    """Raises UserError for files that cannot serve, before anything is compiled."""
    for path in files(config):
        read(path)


def evaluate_run(run: Run, splits: list[str], limit: int | None) -> dict:
    """The figures of each file, by its name without ending; `limit` counts questions of each."""
    options, seen = run.config.evaluation, context(run.config)
    lengths = [n for n in (options.qa_length, None if seen is None else seen - options.qa_tokens) if n]
    common = dict(tokens=options.qa_tokens, batch_size=run.batch_size, shots=options.qa_shots)
    common |= dict(repeat=options.qa_repeat, length=min(lengths, default=None))
    named = {path.stem: read(path, limit) for path in files(run.config)}
    return {"qa": {n: evaluate(run.model, run.params, run.dataset.tokenizer, q, **common) for n, q in named.items()}}


def table(result: dict) -> str:
    columns = (*METRICS, "cut")
    lines = [f"{'questions':<24}" + "".join(f"{name:>13}" for name in columns) + f"{'examples':>10}"]
    for name, values in result["qa"].items():
        lines.append(f"{name:<24}" + "".join(f"{values[c]:>13.4f}" for c in columns) + f"{values['examples']:>10,}")
    return "\n".join(lines)


def plot(axes: "Axes", result: dict) -> None:
    by_name = result["qa"]
    for place, values in enumerate(by_name.values()):
        axes.barh(place, values["contains"], xerr=values["stderr"], color="tab:blue", height=0.6)
    axes.set_yticks(range(len(by_name)), by_name)
    axes.set(xlim=(0, 1), xlabel="answers that contain a reference", title="questions")
    axes.invert_yaxis()
