"""DNA from FASTA files: the next base of a chromosome, and the species of a piece."""

import dataclasses
import gzip
import math
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from seqmodels.data.contract import Batch
from seqmodels.data.domains.baselines import logistic
from seqmodels.data.domains.domain import Baselines, Domain, Splits
from seqmodels.data.domains.examples import digest
from seqmodels.data.domains.files import Place
from seqmodels.errors import UserError

LETTERS = "ACGTN"  # ids 0 to 4; all other letters are N
N = 4
SHARES = (("train", 0.0, 0.8), ("validation", 0.8, 0.9), ("test", 0.9, 1.0))
ENDINGS = (".fa", ".fasta", ".fna", ".fa.gz", ".fasta.gz", ".fna.gz")
ORDERS = (0, 4, 8, 10)  # of the Markov models of the baseline
PIECES = 20000  # pieces of the train split that the k-mer baseline is fitted on


def complement(bases: np.ndarray) -> np.ndarray:
    """Reverse complement of bases [..., T]: the other strand, read in its direction. N stays N."""
    return np.where(bases == N, N, 3 - bases)[..., ::-1].astype(bases.dtype)


@dataclasses.dataclass(frozen=True)
class Strand:
    """Rows of a long sequence, one after the other; the last bases that fill no row are left out.

    Attributes:
        bases: [n] uint8. both: in training, half of the rows come from the other strand.
        length: T.
    """

    bases: np.ndarray
    both: bool
    length: int

    @property
    def count(self) -> int:
        return (len(self.bases) - 1) // self.length

    def read(self, numbers: np.ndarray, length: int, rng: np.random.Generator | None = None) -> Batch:
        """`tokens`, `targets` (-1 where the next base is N) and `segment_ids` [B, T] int32."""
        start = np.asarray(numbers)[:, None] * self.length
        rows = self.bases[start + np.arange(length + 1)].astype(np.int32)
        if self.both and rng is not None:
            rows = np.where(rng.random((len(rows), 1)) < 0.5, complement(rows), rows)
        targets = np.where(rows[:, 1:] == N, -1, rows[:, 1:])
        return {"tokens": rows[:, :-1], "targets": targets, "segment_ids": np.zeros_like(targets)}

    def fingerprint(self) -> str:
        return digest(self.bases)


@dataclasses.dataclass(frozen=True)
class Bases(Domain):
    """The next base. Of all records in order, the first 80 % are the train split, then 10 % validation, 10 % test.

    Attributes:
        reverse_complement: in training, half of the rows come from the other strand.
    """

    objective: ClassVar[str] = "next_token"

    reverse_complement: bool = True

    def splits(self, place: Place, length: int) -> Splits:
        bases = np.concatenate([record for file in fasta_files(place.file()) for record in read_fasta(file)])
        found = {}
        for name, start, end in SHARES:
            part = bases[round(start * len(bases)) : round(end * len(bases))]
            found[name] = Strand(part, self.reverse_complement, length)
            if found[name].count < 1:
                raise UserError(f"config.seq_len={length}: {name} has only {len(part)} bases")
        return found

    def ids(self, splits: Splits) -> dict[str, int]:
        return {"tokens": len(LETTERS), "targets": len(LETTERS)}

    def baselines(self, splits: Splits, split: str) -> Baselines:
        """Markov models that know so many bases before."""
        found = {}
        for order in ORDERS:
            value = bits(counts(splits["train"].bases, order), splits[split].bases, order)
            found[f"order {order}"] = {"bits": value, "loss": value * math.log(2)}
        return found


def counts(bases: np.ndarray, order: int) -> np.ndarray:
    """[4^order, 4] how often each base follows each context."""
    context, following = contexts(bases, order)
    return np.bincount(context * 4 + following, minlength=4 ** (order + 1)).reshape(-1, 4).astype(np.float64)


def contexts(bases: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Number of the `order` bases before, and the base, wherever none of them is N: [n] int64 each."""
    length = len(bases) - order
    context, known = np.zeros(length, np.int64), np.ones(length, bool)
    for i in range(order):
        piece = bases[i : i + length]
        context = context * 4 + np.minimum(piece, 3)
        known &= piece != N
    following = bases[order:]
    known &= following != N
    return context[known], following[known].astype(np.int64)


def bits(table: np.ndarray, bases: np.ndarray, order: int) -> float:
    """Mean bits of the bases under the model of `counts`, to each of which 1 is added."""
    context, following = contexts(bases, order)
    smooth = table + 1
    return float(-np.log2(smooth[context, following] / smooth[context].sum(axis=1)).mean())


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Pieces of the genomes of several species, all equally often.

    Attributes:
        genomes: one [n] uint8 array a species. rows: number of rows.
        moving: whether training draws the places anew for each row; else row i is always the same.
    """

    genomes: tuple[np.ndarray, ...]
    rows: int
    moving: bool

    @property
    def count(self) -> int:
        return self.rows

    def read(self, numbers: np.ndarray, length: int, rng: np.random.Generator | None = None) -> Batch:
        """`tokens` [B, T] int32, `mask` [B, T] and `labels` [B]; a random strand."""
        tokens, labels = np.zeros((len(numbers), length), np.int32), np.asarray(numbers) % len(self.genomes)
        for row, number in enumerate(numbers):
            draw = rng if self.moving and rng is not None else np.random.default_rng([length, int(number)])
            genome = self.genomes[labels[row]]
            start = int(draw.integers(len(genome) - length + 1))
            piece = genome[start : start + length]
            tokens[row] = complement(piece) if draw.random() < 0.5 else piece
        mask = np.ones(tokens.shape, bool)
        return {"tokens": tokens, "mask": mask, "labels": labels.astype(np.int32)}

    def fingerprint(self) -> str:
        return digest(*self.genomes, np.array(self.rows))


@dataclasses.dataclass(frozen=True)
class Species(Domain):
    """The species of a piece, from the folder <species>/<strain>.fasta.

    The last strain of a species, by name, is held out: pieces of it are the validation and the test split, in halves by
    place. Of a species with one strain, the last fifth is. Training draws pieces anew in every epoch. Where strains are
    almost copies of each other, as those of E. coli are, a model may know the held-out genome by heart.

    Attributes:
        rows: of the train split in an epoch. held: rows of the validation, and of the test split.
    """

    rows: int = 20000
    held: int = 2000

    def __post_init__(self) -> None:
        for field in ("rows", "held"):
            if getattr(self, field) < 1:
                self.refuse(field, "at least 1")

    def splits(self, place: Place, length: int) -> Splits:
        folder = place.file()
        names = sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []
        if len(names) < 2:
            raise UserError(f"config.data.path={place.path!r}: must hold a folder for each of two species or more")
        parts: dict[str, list[np.ndarray]] = {name: [] for name, _, _ in SHARES}
        for name in names:
            strains = [np.concatenate(list(read_fasta(file))) for file in fasta_files(name)]
            if len(strains) > 1:
                train, held = np.concatenate(strains[:-1]), strains[-1]
            else:
                train, held = np.split(strains[0], [round(0.8 * len(strains[0]))])
            for split, piece in zip(parts, (train, *np.split(held, [len(held) // 2])), strict=True):
                parts[split].append(piece)
                if len(piece) < length:
                    raise UserError(f"config.seq_len={length}: {split} of {name.name} has only {len(piece)} bases")
        rows = {"train": self.rows, "validation": self.held, "test": self.held}
        return {name: Pieces(tuple(genomes), rows[name], name == "train") for name, genomes in parts.items()}

    def ids(self, splits: Splits) -> dict[str, int]:
        return {"tokens": len(LETTERS), "labels": len(splits["train"].genomes)}

    def baselines(self, splits: Splits, split: str) -> Baselines:
        """Logistic regression on how often each word of three and of four bases occurs in 64 bases."""
        found = {}
        for k in (3, 4):
            train = splits["train"].read(np.arange(min(PIECES, splits["train"].count)), 64)
            test = splits[split].read(np.arange(splits[split].count), 64)
            guess = logistic(words(train["tokens"], k), train["labels"], words(test["tokens"], k))
            found[f"words of {k}, 64 bases"] = {"accuracy": float((guess == test["labels"]).mean())}
        return found


def words(tokens: np.ndarray, k: int) -> np.ndarray:
    """[n, 4^k] how often each word of k bases occurs in rows [n, T]; those with an N do not count."""
    table = np.zeros((len(tokens), 4**k))
    for row, bases in enumerate(tokens):
        context, following = contexts(bases, k - 1)
        table[row] = np.bincount(context * 4 + following, minlength=4**k)
    return table


def fasta_files(place: Path) -> list[Path]:
    """The FASTA files at a path, by name. Raises: UserError where there is none."""
    files = [place] if place.is_file() else sorted(f for f in place.rglob("*") if f.name.endswith(ENDINGS))
    if not files:
        raise UserError(f"config.data.path={str(place)!r}: has no file that ends with {', '.join(ENDINGS)}")
    return files


def read_fasta(path: Path) -> Iterator[np.ndarray]:
    """Records of a file, which may be compressed by gzip: [n] uint8, ids of LETTERS."""
    table = np.full(256, N, np.uint8)
    for number, letter in enumerate("ACGT"):
        table[ord(letter)] = table[ord(letter.lower())] = number
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    head, *records = (b"\n" + content).split(b"\n>")
    if head.strip() or not records:
        raise UserError(f"{path}: must begin with '>', as FASTA files do")
    for record in records:
        body = record.partition(b"\n")[2].translate(None, b"\r\n ")
        yield table[np.frombuffer(body, np.uint8)]
