"""The embedded corpus, and how a text is cut into train, validation and test."""

import lzma
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

EMBEDDED = Path(__file__).with_name("shakespeare_austen.txt.xz")

# The title page at the beginning of each work: its name, perhaps a year, and the author.
TITLE_PAGE = re.compile(
    r"^(?=([A-Z][^\n]*)\n+(?:\(\d{4}\)\n+)?[Bb]y\s+(?:William Shakespeare|Jane Austen)\b)", re.MULTILINE
)
HELD_OUT = {"NORTHANGER ABBEY": "validation", "MACBETH": "validation", "Persuasion": "test", "THE TEMPEST": "test"}

HELD_OUT_SHARE = 0.05  # of a local text: of its end, the last twentieth is the test split, the one before it validation


def works() -> Iterator[tuple[str, str, str]]:
    """The embedded corpus: 42 works of Shakespeare and 6 of Austen, in the public domain.

    A document is a whole work. Each held-out split has one whole work of each author, which is left out of training. So
    the model is not trained on any character, plot or sentence of it. The works are Northanger Abbey and Macbeth
    (validation, 5.9% of the bytes), and Persuasion and The Tempest (test, 6.2%).

    Yields:
      (split, title, text)
    """
    text = lzma.decompress(EMBEDDED.read_bytes()).decode("utf-8")
    pages = list(TITLE_PAGE.finditer(text))
    ends = [page.start() for page in pages[1:]] + [len(text)]
    for page, end in zip(pages, ends, strict=True):
        yield HELD_OUT.get(page[1], "train"), page[1], text[page.start() : end].strip() + "\n"


def cut(
    documents: Iterable[str], total: int, split: str, held_out: Sequence[str] = ("validation", "test")
) -> Iterator[str]:
    """The part of a text that belongs to a split. The splits are contiguous and share no text.

    Each split of `held_out` is `HELD_OUT_SHARE` of the text, at its end and in this order; train is all before them.
    A document that crosses a border is cut at the end of a line, or at the end of a word if there is no line end. If it
    is shorter than a hundredth of the text, it stays whole, in the earlier split.

    Args:
      documents: the whole text, document by document.
      total: its length in characters.
      split: train, or one of `held_out`.
    """
    shares = [0.0, *(1 - n * HELD_OUT_SHARE for n in range(len(held_out), -1, -1))]
    n = ("train", *held_out).index(split)
    first, last = (round(total * share) for share in shares[n : n + 2])
    start = 0
    for document in documents:
        begin, end = (_cut_at(document, border - start, total) for border in (first, last))
        if document[begin:end].strip():
            yield document[begin:end]
        start += len(document)


def _cut_at(document: str, border: int, total: int) -> int:
    """Where to cut a document if a border lies `border` characters after its beginning."""
    if border <= 0:
        return 0
    if border >= len(document) or len(document) < total / 100:
        return len(document)
    nearest = max(0, border - total // 100)  # do not search further back, so that no split becomes too small
    return document.rfind("\n", nearest, border) + 1 or document.rfind(" ", nearest, border) + 1 or border
