"""Makes a corpus of prose from the RFCs, and a byte-pair tokenizer for it.

    python benchmarks/rfc_prose.py FOLDER --out=data/rfc

FOLDER is searched for rfc<number>.txt and .txt.gz: from Debian's packages doc-rfc-* (non-free), unpacked with
`dpkg-deb --extract`, or from rfc-editor.org. The script writes prose.jsonl.xz, one document per line in the order of
their numbers, which config.data.name=text reads. Its held-out text then consists of the newest documents; this matters
because RFCs repeat their predecessors. It also writes bpe<size>.json, trained on documents that are not held out. The
same files and flags give the same bytes.

A paragraph counts as prose if it has at least 12 words, most of them in lower case, and nearly all of it is letters.
Page headers and footers are removed, and repeated paragraphs are dropped. RFCs may be copied whole, but modified copies
may not be distributed: do not publish the output of this script.
"""

import argparse
import gzip
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seqmodels.data.train_tokenizer import train

NUMBER = re.compile(r"rfc0*([1-9]\d*)\.txt(\.gz)?$")
PAGE = re.compile(r"^(?:.*\[Page [\divxlc]+\]|RFC \d+ .*\b\d{4})[ \t]*$", re.IGNORECASE | re.MULTILINE)
GAP = re.compile(r"\n[ \t]*\n\s*")
PLAIN = re.compile(r"[^\W\d_]|[\s,.;:'\"()-]")  # letters, space and the marks of sentences
WORDS, CHARACTERS = 12, 80  # least words and characters of a paragraph
LOWER, LETTERS = 0.6, 0.93  # least shares of its words in lower case, and of PLAIN characters
SHORTEST = 500  # least characters of a document
HELD_OUT = 0.1  # share of the text that config.data.name=text holds out, at its end


def find(folder: Path) -> list[tuple[int, Path]]:
    """(number, file), sorted by number. A document that is found more than once counts once."""
    found = {}
    for path in sorted(folder.rglob("rfc*.txt*")):
        if match := NUMBER.fullmatch(path.name):
            found.setdefault(int(match[1]), path)
    return sorted(found.items())


def read(path: Path) -> str:
    """The text of a file in UTF-8 or (the oldest files) Latin-1, without control characters."""
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return text.replace("\r", "").replace("\0", "").replace("\f", "\n")


def paragraphs(text: str) -> Iterator[str]:
    """The prose of a document, each paragraph on one line."""
    for paragraph in GAP.split(PAGE.sub("", text)):
        words = paragraph.split()
        if len(words) < WORDS or len(paragraph) < CHARACTERS or "...." in paragraph:  # dots: a table of contents
            continue
        if sum(word.islower() for word in words) <= LOWER * len(words):
            continue
        if len(PLAIN.findall(paragraph)) > LETTERS * len(paragraph):
            yield " ".join(words)


def documents(files: Iterable[tuple[int, Path]]) -> Iterator[tuple[int, str]]:
    """(number, prose) of the documents that contain prose."""
    seen = set()
    for number, path in files:
        fresh = [paragraph for paragraph in paragraphs(read(path)) if paragraph not in seen]
        seen.update(fresh)
        if len(text := "\n\n".join(fresh)) > SHORTEST:
            yield number, text


def sample(corpus: list[tuple[int, str]], size: int, whole: int) -> list[tuple[int, str]]:
    """About `size` characters: every document from number `whole` on, and as many older documents as fit.

    The older documents are drawn by a hash of their number, so a smaller sample is a subset of a larger one.
    """
    old = sorted((zlib.crc32(str(number).encode()), number, text) for number, text in corpus if number < whole)
    room = size - sum(len(text) for number, text in corpus if number >= whole)
    chosen = set()
    for _, number, text in old:
        if (room := room - len(text)) < 0:
            break
        chosen.add(number)
    return [(number, text) for number, text in corpus if number >= whole or number in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("data/rfc"))
    parser.add_argument("--megabytes", type=float, default=0, help="of a sample; all if left out")
    parser.add_argument("--whole", type=int, default=9100, help="number from which a sample leaves nothing out")
    parser.add_argument("--vocabulary", type=int, default=8192, help="ids of the tokenizer; 0: none")
    parser.add_argument("--tokenizer_megabytes", type=float, default=50, help="text that it is trained on")
    options = parser.parse_args()
    files = find(options.folder)
    if not files:
        parser.error(f"{options.folder}: no rfc<number>.txt or .txt.gz in it")
    corpus = list(documents(files))
    if options.megabytes:
        corpus = sample(corpus, int(options.megabytes * 1e6), options.whole)
    options.out.mkdir(parents=True, exist_ok=True)
    with lzma.open(options.out / "prose.jsonl.xz", "wt", encoding="utf-8", preset=1) as file:
        for number, text in corpus:
            file.write(json.dumps({"rfc": number, "text": text}, ensure_ascii=False) + "\n")
    size = sum(len(text) for _, text in corpus)
    print(f"{options.out / 'prose.jsonl.xz'}: {len(corpus):,} documents of {len(files):,} files, {size:,} characters")
    if not options.vocabulary:
        return
    room, seen = int(options.tokenizer_megabytes * 1e6), []
    before = 0
    for number, text in sorted(corpus, key=lambda document: zlib.crc32(str(document[0]).encode())):
        if before + len(text) > room:
            break
        seen.append((number, text))
        before += len(text)
    newest = _first_held_out(corpus, size)
    path = options.out / f"bpe{options.vocabulary}.json"
    train([text for number, text in seen if number < newest], options.vocabulary).save(str(path))
    print(f"{path}: trained on documents before RFC {newest}")


def _first_held_out(corpus: list[tuple[int, str]], size: int) -> int:
    """The first document that does not end before the held-out share of the text begins."""
    ends = 0
    for number, text in corpus:
        if (ends := ends + len(text)) > (1 - HELD_OUT) * size:
            return number
    return corpus[-1][0]


if __name__ == "__main__":
    main()
