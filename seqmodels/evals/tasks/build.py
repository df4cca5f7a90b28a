"""Makes the task files of this folder out of Persuasion, which is in the test split of the corpus of the project.

    python -m seqmodels.evals.tasks.build

endings.jsonl: a passage, and four sentences of which the first one after it in the book is the answer. cloze.jsonl: a
passage whose last word occurs in it before, as in LAMBADA (Paperno et al. 2016). passages.jsonl: whole passages.
"""

import json
import random
import re
from pathlib import Path

from seqmodels.data.text import works

FOLDER = Path(__file__).parent
BOOK = "Persuasion"
EXAMPLES = 100
SENTENCE = re.compile(r"[^.!?]+[.!?]+[\"”]?")


def sentences() -> list[list[str]]:
    """The book's paragraphs of at least four sentences, each a list of them."""
    book = next(text for split, title, text in works() if title == BOOK and split == "test")
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", book))
    return [found for p in paragraphs if len(found := [s.strip() for s in SENTENCE.findall(p)]) >= 4]


def endings(paragraphs: list[list[str]], rng: random.Random) -> list[dict]:
    """Passage, four endings, which one is right; the wrong ones are last sentences of other paragraphs."""
    usable = [p for p in paragraphs if 30 <= len(p[-1]) <= 120 and len(" ".join(p[:-1])) >= 150]
    examples = []
    for paragraph in rng.sample(usable, EXAMPLES):
        choices = [paragraph[-1], *rng.sample([p[-1] for p in usable if p is not paragraph], 3)]
        rng.shuffle(choices)
        prompt = " ".join(paragraph[:-1])[-400:].split(" ", 1)[1]
        answer = choices.index(paragraph[-1])
        examples.append(dict(prompt=prompt, choices=[" " + choice for choice in choices], answer=answer))
    return examples


def cloze(paragraphs: list[list[str]], rng: random.Random) -> list[dict]:
    """Passages whose last word, of five letters or more, was in them before."""
    examples = []
    for words in (" ".join(paragraph).split() for paragraph in paragraphs):
        for stop in range(len(words) - 1, 40, -1):
            last = words[stop]
            if re.fullmatch(r"[A-Za-z]{5,}", last) and last in words[stop - 40 : stop]:
                examples.append(dict(prompt=" ".join(words[max(stop - 60, 0) : stop]), word=last))
                break
    return rng.sample(examples, EXAMPLES)


def passages(paragraphs: list[list[str]], rng: random.Random) -> list[dict]:
    """Whole paragraphs."""
    return [dict(text=" ".join(paragraph)) for paragraph in rng.sample(paragraphs, 20)]


if __name__ == "__main__":
    for make in (endings, cloze, passages):
        path = FOLDER / f"{make.__name__}.jsonl"
        examples = make(sentences(), random.Random(0))
        path.write_text("".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples))
        print(f"{path}: {len(examples)} examples")
