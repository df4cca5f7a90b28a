"""RegBench: learning a regular language in context (Akyurek et al. 2024, arXiv 2401.12973, section 3)."""

import dataclasses
from typing import ClassVar

import numpy as np

from seqmodels.data.synthetic.automata import Edges, random_automaton, smallest, walk
from seqmodels.data.synthetic.task import Rows, Task, only, refuse_length


@dataclasses.dataclass(frozen=True)
class RegularLanguage(Task):
    """Words of a random automaton, a bar between them; every row has an automaton of its own.

    An automaton has from `edges` + 1 to `most_states` states, and from `edges` + 1 to `vocab` symbols, both uniformly
    many; see `random_automaton`. A word has from 1 to `longest` symbols and is a walk from the start, each edge of a
    state with the same probability. Words follow each other to the end of the row, where the last is cut off. Ids: 0 to
    A - 1 the symbols, A the bar. Loss mask: wherever a symbol follows, and not where a bar does; every symbol that the
    automaton allows there is right. Automata of training are in no other split.

    In the authors' code rows have 10 to 19 words and padding, and a run has 1,000 to 40,000 automata, which come again.

    Attributes:
      vocab: A. most_states: of an automaton before states that do the same are joined. edges: most of a state.
      longest: most symbols of a word.
    """

    vocab: int = 18
    most_states: int = 12
    edges: int = 3
    longest: int = 49

    by_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.edges < 1:
            self.refuse("edges", "at least 1")
        for field in ("vocab", "most_states"):
            if getattr(self, field) <= self.edges:
                self.refuse(field, f"at least {self.edges + 1}, more than config.data.task.edges")
        if self.longest < 1:
            self.refuse("longest", "at least 1")

    @property
    def symbols(self) -> list[str]:
        return [*(f"s{i}" for i in range(self.vocab)), "|"]

    def check(self, length: int) -> None:
        if length < 2:
            refuse_length(length, "at least 2")

    def automaton(self, rng: np.random.Generator) -> Edges:
        """A random automaton in its smallest form."""
        states = int(rng.integers(self.edges + 1, self.most_states + 1))
        size = int(rng.integers(self.edges + 1, self.vocab + 1))
        return smallest(random_automaton(rng, states, rng.choice(self.vocab, size, replace=False), self.edges))

    def rows(self, rng: np.random.Generator, count: int, length: int) -> Rows:
        shape = count, length + 1
        text, counted = np.full(shape, self.vocab, np.int32), np.zeros(shape, bool)
        allowed = np.zeros((*shape, len(self.symbols)), bool)
        source = np.full((count, self.most_states, self.vocab), -1, np.int32)
        for row in range(count):
            automaton, end = self.automaton(rng), 0
            for state, edges in enumerate(automaton):
                source[row, state, list(edges)] = list(edges.values())
            while end < length + 1:
                size = min(int(rng.integers(1, self.longest + 1)), length + 1 - end)
                word, possible = walk(automaton, rng.random(size).tolist())
                text[row, end : end + size], counted[row, end : end + size] = word, True
                for place, symbols in enumerate(possible, end):
                    allowed[row, place, symbols] = True
                end += size + 1  # and a bar
        targets, answers = text[:, 1:], counted[:, 1:]
        return Rows(
            np.ascontiguousarray(text[:, :-1]),
            only(answers, targets),
            answers.copy(),
            allowed[:, 1:],
            source.reshape(count, -1),
        )
