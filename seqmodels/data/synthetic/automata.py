"""Random finite automata whose words are all walks from the start: their smallest form, and words of them."""

import numpy as np

Edges = list[dict[int, int]]  # of each state, numbered from the start, 0: symbol -> next state. Every state accepts.


def random_automaton(rng: np.random.Generator, states: int, symbols: np.ndarray, edges: int) -> Edges:
    """Every state has 1 to `edges` edges, uniformly many, with different symbols, to different states but itself.

    Args:
      states: number of states, more than `edges`. symbols: [at least `edges`] int, those that may occur.
    """
    automaton = []
    for state in range(states):
        size = int(rng.integers(1, edges + 1))
        others = np.delete(np.arange(states), state)
        ends = rng.choice(others, size, replace=False).tolist()
        automaton.append(dict(zip(rng.choice(symbols, size, replace=False).tolist(), ends, strict=True)))
    return automaton


def smallest(automaton: Edges) -> Edges:
    """The automaton with the fewest states that has the same words; two with the same words have the same form.

    States are numbered in the order in which a search in breadth finds them, the smallest symbol first.
    """
    # States are of one class until their edges lead into different classes (Moore 1956).
    classes, count = [0] * len(automaton), 0
    while True:
        seen: dict[tuple, int] = {}
        leads = [tuple(sorted((symbol, classes[end]) for symbol, end in edges.items())) for edges in automaton]
        classes = [seen.setdefault(lead, len(seen)) for lead in leads]
        if len(seen) == count:
            break
        count = len(seen)
    number, queue = {classes[0]: 0}, [0]
    for state in queue:
        for _, end in sorted(automaton[state].items()):
            if classes[end] not in number:
                number[classes[end]] = len(number)
                queue.append(end)
    return [{symbol: number[classes[end]] for symbol, end in sorted(automaton[state].items())} for state in queue]


def walk(automaton: Edges, choices: list[float]) -> tuple[list[int], list[list[int]]]:
    """A word and, before each of its symbols, the symbols that may come.

    Args:
      choices: [k] numbers from 0 to 1; each chooses one of the edges, uniformly if it is uniform.
    """
    word, possible, state = [], [], 0
    for choice in choices:
        edges = list(automaton[state])
        symbol = edges[int(choice * len(edges))]
        word.append(symbol)
        possible.append(edges)
        state = automaton[state][symbol]
    return word, possible
