"""Every task against a solver of its own: what a row asks can be found in it, and nothing else is asked."""

import itertools
import re

import numpy as np
import pytest

from seqmodels.data.synthetic import GOES_ON, TASKS, make_task
from seqmodels.data.synthetic.modular_arithmetic import values
from seqmodels.data.synthetic.mqar import gaps
from seqmodels.data.synthetic.transduction import LANGUAGES
from tests.task_rows import example, expect_share, words

# name, fields, tokens of a row
CASES = [
    ("copying", dict(vocab=7, tokens=5), 23),
    ("copying", dict(vocab=4, tokens=3), 6),
    ("selective_copying", dict(vocab=7, tokens=5), 23),
    ("induction", dict(vocab=6), 17),
    ("induction", dict(vocab=3), 4),
    ("recall", dict(vocab=9), 20),
    ("recall", dict(vocab=10), 4),
    ("mqar", dict(vocab=40, shapes=((24, 4, 1.0),)), 24),
    ("mqar", dict(vocab=41, shapes=((16, 4, 3.0), (24, 2, 1.0)), random_filler=True, power=1.0), 30),
    ("parity", dict(), 12),
    ("parity", dict(shortest=3), 12),
    ("parity", dict(ask="every"), 12),
    ("majority", dict(shortest=1), 12),
    ("majority", dict(ask="every"), 13),
    ("modular_arithmetic", dict(), 14),
    ("modular_arithmetic", dict(modulus=7, shortest=1), 15),
    ("modular_arithmetic", dict(modulus=3, operators="*-", shortest=5), 13),
    ("modular_arithmetic", dict(brackets=True, operators="+-", shortest=1), 31),
    ("modular_arithmetic", dict(brackets=True, modulus=3), 26),
    ("word_problem", dict(group="s3"), 10),
    ("word_problem", dict(group="s5", shortest=2), 10),
    ("word_problem", dict(group="z60"), 10),
    ("listops", dict(depth=4, arguments=5, shortest=4, longest=60), 64),
    ("passkey", dict(), 70),
    ("passkey", dict(depth=0.25), 100),
    ("in_context_recall", dict(vocab=9), 33),
    ("in_context_recall", dict(vocab=12, noise_vocab=5, noise=0.4), 21),
    ("fuzzy_recall", dict(), 60),
    ("fuzzy_recall", dict(vocab=9, longest=2, shortest=2), 9),
    ("memorization", dict(vocab=21), 12),
    ("memorization", dict(vocab=6, map_seed=1), 12),
    ("compression", dict(vocab=5), 9),
    ("regular_language", dict(), 60),
    ("regular_language", dict(vocab=4, most_states=5, edges=2, longest=6), 40),
    ("string_copy", dict(), 33),
    ("string_copy", dict(ask="prefix", shortest=0, gram=3), 60),
    ("string_copy", dict(ask="suffix", letters=5, follow=4), 24),
    *(("transduction", dict(language=language), 24) for language in LANGUAGES),
]
IDS = [f"{name}-{'-'.join(map(str, fields.values()))}" for name, fields, _ in CASES]
COUNT = 200


# What each row should ask: position -> name of the answer


def solve_copying(text, task):
    told = [word for word in text if word not in "_?"]
    return dict(zip((i for i, word in enumerate(text) if word == "?"), told, strict=True))


def solve_induction(text, task):
    return {len(text) - 1: text[text.index("=>") + 1]}


def solve_recall(text, task):
    pairs, (marker, asked) = text[:-2], text[-2:]
    known = {}
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        assert key[0] == "k" and value[0] == "v" and known.setdefault(key, value) == value
    assert marker == "=>"
    return {len(text) - 1: known[asked]}


def solve_mqar(text, task):
    """Only rows without random filler can be solved by looking; see test_mqar_with_random_filler."""
    pairs = list(itertools.takewhile(lambda pair: pair[1][0] == "v", zip(text[::2], text[1::2], strict=True)))
    known = dict(pairs)
    assert len(known) == len(pairs) == len(set(known.values()))
    return {i: known[word] for i, word in enumerate(text) if i >= 2 * len(pairs) and word != "_"}


def solve_parity(text, task):
    if task.ask == "every":
        return {i: str(text[: i + 1].count("1") % 2) for i in range(len(text))}
    end = text.index("=")
    return {end: str(text[:end].count("1") % 2)}


def solve_majority(text, task):
    ends = range(1, len(text) + 1) if task.ask == "every" else [text.index("=")]
    shift = 1 if task.ask == "every" else 0
    return {end - shift: str(int(text[:end].count("1") > text[:end].count("0"))) for end in ends}


def solve_modular_arithmetic(text, task):
    end = text.index("=")
    assert task.brackets or end % 2
    return {end: str(eval("".join(text[:end])) % task.modulus)}


def solve_word_problem(text, task):
    """By moving points with each element, not by the table."""
    if task.group == "z60":
        elements = [tuple((i + shift) % 60 for i in range(60)) for shift in range(60)]
    else:
        elements = list(itertools.permutations(range(int(task.group[1]))))
    answers, product = {}, tuple(range(len(elements[0])))
    for i, word in enumerate(itertools.takewhile(lambda word: word != "_", text)):
        product = tuple(product[point] for point in elements[int(word[1:])])
        answers[i] = f"g{elements.index(product)}"
    return answers


def solve_listops(text, task):
    end = text.index("=")
    assert task.shortest < end < task.longest
    rest = iter(text[:end])

    def node(word, level):
        assert level <= task.depth
        if word.isdigit():
            return int(word)
        arguments = [node(inner, level + 1) for inner in iter(lambda: next(rest), "]")]
        assert 2 <= len(arguments) <= task.arguments
        kind = {"[MIN": min, "[MAX": max, "[MED": lambda x: int(np.median(x)), "[SM": lambda x: sum(x) % 10}
        return kind[word](arguments)

    result = node(next(rest), 1)
    assert next(rest, None) is None
    return {end: str(result)}


def solve_passkey(text, task):
    (key, again) = re.findall(r"(?:the pass key is|remember it \.) (\d \d \d \d \d)", " ".join(text))
    assert key == again and 1 <= int(key.replace(" ", "")) <= 50_000
    assert text[-4:] == key.split()[:4]
    return dict(zip(range(len(text) - 5, len(text)), key.split(), strict=True))


def solve_in_context_recall(text, task):
    known, answers = {}, {}
    for i in range(0, len(text), 2):
        if text[i] in known:
            answers[i] = known[text[i]]
        elif text[i][0] == "k" and i + 1 < len(text):
            known[text[i]] = text[i + 1]
    return answers


def solve_fuzzy_recall(text, task):
    """Keys and values follow each other; the last value is there but for its last symbol."""
    row = " ".join(text).lstrip("_ ")
    pieces = [piece.split() for piece in re.findall(r"(?:k\d+ ?)+|(?:v\d+ ?)+", row)]
    known, answers, place = {}, {}, len(text) - len(row.split())
    for n, piece in enumerate(pieces):
        if piece[0][0] == "k":
            key, whole = tuple(piece), n + 2 < len(pieces)
            if key in known:
                answers |= {place + len(key) - 1 + i: symbol for i, symbol in enumerate(known[key])}
            else:
                assert whole
                known[key] = pieces[n + 1]
            assert task.shortest <= len(key) <= task.longest
        assert len(set(piece)) == len(piece) <= task.longest
        place += len(piece)
    return answers


def solve_memorization(text, task):
    rng = np.random.default_rng(task.map_seed)
    values = rng.permutation(np.arange((task.vocab - 1) // 2, task.vocab - 1))
    assert text[1::2] == ["=>"] * (len(text) // 2)
    return {i: task.symbols[values[int(text[i - 1][1:])]] for i in range(1, len(text), 2)}


def solve_compression(text, task):
    assert text[-1] == "!" and "!" not in text[:-1]
    return dict(enumerate(text))


def solve_regular_language(text, task):
    """What was drawn behind the last token is not in the row; see test_words_of_automata."""
    return {i: symbol for i, symbol in enumerate(text[1:]) if symbol != "|"}


def solve_string_copy(text, task):
    row = "".join(text).rstrip("_")
    if task.ask == "copy":
        (answer,) = re.fullmatch(r"\$([a-z]+)\|\1", row).groups()
        start = len(answer) + 1
    else:
        first, second, shown = re.fullmatch(r"\$([a-z]+)\|([a-z]+)\|([a-z]+)", row).groups()
        gram, string = (first, second) if task.ask == "prefix" else (second, first)
        (answer,) = re.findall(f"(?={gram}([a-z]{{{task.follow}}}))", string)
        assert answer == shown and len(gram) == task.gram
        start = len(row) - len(answer) - 1
    return {start + i: letter for i, letter in enumerate(answer + ".")}


def machine(actions, stack):
    for action in actions:
        stack = stack[1:] if action == "P" else action.lower() + stack
    return stack


TRANSDUCE = {
    "even_pairs": lambda s: str(int((s.count("ab") + s.count("ba")) % 2 == 0)),
    "cycle_navigation": lambda s: str(sum((0, 1, 4)[int(move)] for move in s) % 5),
    "stack": lambda s: machine(s.lstrip("ab"), s[: len(s) - len(s.lstrip("ab"))][::-1]) + ".",
    "reverse": lambda s: "".join(s[-1 - i] for i in range(len(s))),
    "equation": lambda s: next(x for x in "01234" if eval(s.replace("x", x).replace("~", "-")) % 5 == 0),
    "duplicate": lambda s: 2 * s,
    "missing_duplicate": lambda s: next(x for x in "01" if (t := s.replace("?", x))[: len(t) // 2] * 2 == t),
    "odds_first": lambda s: "".join(s[i] for i in sorted(range(len(s)), key=lambda i: i % 2)),
    "addition": lambda s: f"{eval('+'.join('0b' + part[::-1] for part in s.split('+'))):b}"[::-1] + ".",
    "multiplication": lambda s: f"{eval('*'.join('0b' + part[::-1] for part in s.split('*'))):b}"[::-1] + ".",
    "sqrt": lambda s: f"{int(int(s[::-1], 2) ** 0.5):b}"[::-1] + ".",
    "bucket_sort": lambda s: "".join(digit * s.count(digit) for digit in "12345"),
}


def solve_transduction(text, task):
    end = text.index("=")
    assert set(text[end + 1 :]) <= {"_"} and end >= task.shortest
    return {end + i: symbol for i, symbol in enumerate(TRANSDUCE[task.language]("".join(text[:end])))}


SOLVERS = {name[len("solve_") :]: solver for name, solver in globals().items() if name.startswith("solve_")}
SOLVERS["selective_copying"] = solve_copying


def test_every_task_has_a_case_and_a_solver():
    assert set(TASKS) == {name for name, *_ in CASES} == set(SOLVERS)


@pytest.mark.parametrize("name, fields, length", CASES, ids=IDS)
def test_answers_are_those_of_a_solver(name, fields, length):
    if fields.get("random_filler"):
        pytest.skip("see test_mqar_with_random_filler")
    task, rows = example(name, fields, length)
    for tokens, targets, answers in zip(*rows[:3], strict=True):
        asked = {int(i): task.symbols[targets[i]] for i in np.flatnonzero(answers)}
        if name == "regular_language":
            asked.pop(length - 1, None)
        assert asked == SOLVERS[name](words(task, tokens), task)
        assert asked


@pytest.mark.parametrize("name, fields, length", CASES, ids=IDS)
def test_rows_are_well_formed(name, fields, length):
    """Shapes, dtypes, ids; targets at all answers, and elsewhere the next token or nothing; a pure function."""
    task, rows = example(name, fields, length)
    assert [part.shape for part in rows[:3]] == [(COUNT, length)] * 3
    assert [part.dtype for part in rows[:3]] == [np.int32, np.int32, bool]
    assert len(set(task.symbols)) == len(task.symbols) and not any(" " in symbol for symbol in task.symbols)
    assert rows.tokens.min() >= 0 and max(rows.tokens.max(), rows.targets.max()) < len(task.symbols)
    assert (rows.targets[rows.answers] >= 0).all() and rows.answers.any(axis=1).all()
    others = rows.targets[:, :-1][~rows.answers[:, :-1]]
    assert (others == (rows.tokens[:, 1:][~rows.answers[:, :-1]] if name in GOES_ON else -1)).all()
    again = example(name, fields, length)[1]
    other = example(name, fields, length, seed=1)[1]
    assert all((a == b).all() for a, b in zip(rows[:3], again[:3], strict=True))
    assert (rows.tokens != other.tokens).any()


# Distributions


def test_copying_places_and_tokens():
    _task, rows = example("copying", dict(vocab=7, tokens=5), 23)
    assert (rows.tokens[:, :5] > 0).all() and not rows.tokens[:, 5:18].any()
    _, rows = example("selective_copying", dict(vocab=7, tokens=5), 23, count=4000)
    for place in range(18):
        expect_share((rows.tokens[:, place] > 0).sum(), 5 / 18, 4000)
    for token in range(1, 6):
        expect_share((rows.targets[:, -5] == token).sum(), 1 / 5, 4000)


def test_induction_trigger_is_uniform_and_twice():
    _task, rows = example("induction", dict(vocab=6), 12, count=4000)
    assert ((rows.tokens == 5).sum(axis=1) == 2).all() and (rows.tokens[:, -1] == 5).all()
    for place in range(9):
        expect_share((rows.tokens[:, place] == 5).sum(), 1 / 9, 4000)


def test_recall_asks_uniformly_among_the_keys_shown():
    _task, rows = example("recall", dict(vocab=5), 8, count=8000)  # 2 keys, 3 pairs
    counts = {shown: (rows.tokens[:, 0:6:2].sum(axis=1) == shown) for shown in range(4)}
    for shown, which in counts.items():  # how many of the three are key 1
        asked = rows.tokens[which, -1]
        expect_share(asked.sum(), {0: 0.0, 1: 0.5, 2: 0.5, 3: 1.0}[shown], which.sum())


@pytest.mark.parametrize("power", [0.01, 1.0, 0.5])
def test_mqar_gaps_are_drawn_one_after_another_without_replacement(power):
    space, count = 4, 20_000
    drawn = gaps(np.random.default_rng(0), count, space, 2, power)
    p = np.arange(1, space + 1) ** (power - 1.0)
    p /= p.sum()
    for i, j in itertools.product(range(space), repeat=2):
        expected = 0.0 if i == j else p[i] * p[j] / (1 - p[i])
        expect_share(((drawn == (i, j)).all(axis=1)).sum(), expected, count)


def test_mqar_queries_come_at_the_gaps():
    """The first key's gap has the power law's share at each slot, and nothing stands in a slot's second place."""
    _task, rows = example("mqar", dict(vocab=64, shapes=((64, 4, 1.0),)), 64, count=4000)
    assert not rows.tokens[:, 9::2].any()
    first = (rows.tokens[:, 8::2] == rows.tokens[:, :1]).argmax(axis=1)
    p = np.arange(1, 29) ** (0.01 - 1.0)
    for slot in range(28):
        expect_share((first == slot).sum(), p[slot] / p.sum(), 4000)
    for key in range(1, 32):
        expect_share((rows.tokens[:, 0] == key).sum(), 1 / 31, 4000)


def test_mqar_with_random_filler():
    fields = dict(vocab=4096, shapes=((16, 4, 3.0), (24, 2, 1.0)), random_filler=True)
    _task, rows = example("mqar", fields, 30, count=2000)
    short = ~rows.tokens[:, 16:24].any(axis=1)
    expect_share(short.sum(), 3 / 4, 2000)
    assert not rows.tokens[:, 24:].any()
    for which, pairs, size in ((short, 4, 16), (~short, 2, 24)):
        tokens, targets, answers, *_ = rows.take(which)
        assert (answers.sum(axis=1) == pairs).all() and not answers[:, : 2 * pairs].any()
        filler = tokens[:, 2 * pairs : size][~answers[:, 2 * pairs : size]]
        assert 1900 < filler.mean() < 2200 and filler.max() > 4000
        for row, goal, asked in zip(tokens[:100], targets, answers, strict=False):
            known = dict(zip(row[0 : 2 * pairs : 2].tolist(), row[1 : 2 * pairs : 2].tolist(), strict=True))
            found = {row[i]: goal[i] for i in np.flatnonzero(asked)}
            assert found == known


def test_recall_in_context():
    """Shares of noise and of keys, and the last key among those shown."""
    _task, rows = example("in_context_recall", dict(vocab=12, noise_vocab=4, noise=0.25), 17, count=4000)
    noise = rows.tokens[:, 0:-1:2] >= 8
    assert ((rows.tokens[:, 1::2] >= 8) == noise).all() and not noise.all(axis=1).any()
    expect_share((rows.tokens[:, 0] >= 8).sum(), 0.25 * 7 / 8, 4000)  # one of the eight pairs is no noise, for certain
    for key in range(4):
        expect_share((rows.tokens[~noise[:, 0], 0] == key).sum(), 1 / 4, (~noise[:, 0]).sum())
    for value in range(4, 8):
        expect_share((rows.targets[:, -1] == value).sum(), 1 / 4, 4000)


def test_motifs_are_uniform():
    """Of the first keys, each length has a third, and each symbol a seventh of the first places."""
    _task, rows = example("fuzzy_recall", dict(), 40, count=3000)
    start = (rows.tokens != 15).argmax(axis=1)
    text = np.take_along_axis(rows.tokens, start[:, None] + np.arange(4), axis=1)
    sizes = (text >= 7).argmax(axis=1)
    for size in (1, 2, 3):
        expect_share((sizes == size).sum(), 1 / 3, 3000)
    for symbol in range(7):
        expect_share((text[:, 0] == symbol).sum(), 1 / 7, 3000)


@pytest.mark.parametrize("language", LANGUAGES)
def test_inputs_of_all_lengths(language):
    """Uniform over the lengths that fit, the longest included; answers never need more room than is kept."""
    task, rows = example("transduction", dict(language=language), 18, count=2000)
    sizes = (rows.tokens == task.symbols.index("=")).argmax(axis=1)
    for size in task.sizes(18):
        expect_share((sizes == size).sum(), 1 / len(task.sizes(18)), 2000)
    kind, rng = LANGUAGES[language], np.random.default_rng(0)
    for size in task.sizes(60):
        text = kind.draw(rng, size)
        assert len(text) == size and len(kind.answer(text)) <= kind.room(size) and set(text) <= set(kind.symbols)


def test_lengths_of_bits_words_and_expressions_are_uniform():
    for name, fields, length, sizes in [
        ("parity", dict(shortest=3), 8, range(3, 8)),
        ("word_problem", dict(group="s3", shortest=2), 6, range(2, 7)),
        ("modular_arithmetic", dict(shortest=3), 11, (3, 5, 7, 9)),
        ("modular_arithmetic", dict(shortest=3, brackets=True), 8, range(3, 8)),
    ]:
        _task, rows = example(name, fields, length, count=4000)
        last = rows.answers.shape[1] - 1 - rows.answers[:, ::-1].argmax(axis=1)
        found = last + (name == "word_problem")
        assert set(found.tolist()) == set(sizes)
        for size in sizes:
            expect_share((found == size).sum(), 1 / len(sizes), 4000)


def test_parity_and_majority_are_balanced():
    for name, length, share in (("parity", 12, 0.5), ("majority", 12, 0.5)):  # 11 bits: no ties
        _, rows = example(name, dict(), length, count=4000)
        expect_share(rows.targets[rows.answers].sum(), share, 4000)


def test_brackets_split_uniformly():
    """An expression of 9 tokens is "(", a left side of 1 to 5, an operator, a right side of the rest, ")"."""
    _task, rows = example("modular_arithmetic", dict(brackets=True, operators="+-"), 10, count=3000)
    operators = np.isin(rows.tokens, (5, 6))
    assert (rows.tokens[:, 0] == 8).all() and (rows.tokens[:, 8] == 9).all() and operators.any(axis=1).all()
    depth = np.cumsum((rows.tokens == 8).astype(int) - (rows.tokens == 9), axis=1)
    sides = [
        next(i for i in range(2, 8) if outer[i] == 1 and is_operator[i] and (i > 2 or row[1] < 5) and row[i - 1] != 8)
        for row, outer, is_operator in zip(rows.tokens.tolist(), depth, operators, strict=True)
    ]
    # where the left side begins with a minus, that sign is not the operator: the first one after something complete
    for left in range(1, 6):
        expect_share(np.sum(np.array(sides) == left + 1), 1 / 5, 3000)


def test_running_values_by_python():
    rng = np.random.default_rng(0)
    numbers, operators = rng.integers(0, 7, (50, 9)), rng.integers(0, 3, (50, 8))
    running = values(numbers, operators, 7)
    for row in range(50):
        text = str(numbers[row, 0])
        for k in range(9):
            text += f"{'+-*'[operators[row, k - 1]]}{numbers[row, k]}" if k else ""
            assert running[row, k] == eval(text) % 7


def test_listops_shares():
    """A quarter of the nodes above the deepest level are operators, and their arguments are 2 to 5, uniformly."""
    task = make_task("listops", dict(depth=3, arguments=5, shortest=0, longest=10_000))
    rng = np.random.default_rng(0)
    trees = [task._tree(rng) for _ in range(4000)]
    operators = [tree for tree in trees if len(tree) > 1]
    expect_share(len(operators), 0.25, 4000)
    for kind in range(10, 14):
        expect_share(sum(tree[0] == kind for tree in operators), 1 / 4, len(operators))
    nodes, inner, arguments = 0, 0, []
    for tree in operators:
        level, count = 0, 0
        for token in tree:
            count += level == 1 and token != 14
            nodes += level == 1 and token != 14
            inner += level == 1 and 10 <= token < 14
            level += (10 <= token < 14) - (token == 14)
        arguments.append(count)
    expect_share(inner, 0.25, nodes)
    for size in range(2, 6):
        expect_share(arguments.count(size), 1 / 4, len(operators))


def test_listops_of_the_long_range_arena():
    task, rows = example("listops", dict(depth=10, arguments=10, shortest=500, longest=2000), 2048, count=4)
    sizes = rows.answers.argmax(axis=1)
    assert (sizes > 500).all() and (sizes < 2000).all()
    for row in range(4):
        (answer,) = solve_listops(words(task, rows.tokens[row]), task).values()
        assert answer == str(rows.targets[row, sizes[row]])


def test_passkey_depths():
    for depth in (0.0, 0.3, 1.0):
        task, rows = example("passkey", dict(depth=depth), 143, count=3)
        for tokens in rows.tokens:
            text = words(task, tokens)
            start = " ".join(text).index("the pass key is")
            hay = 143 - 23 - 10 - 4
            assert len(" ".join(text)[:start].split()) == round(depth * hay)
    task, rows = example("passkey", dict(), 143, count=300)
    starts = [" ".join(words(task, tokens)).index("the pass key is") for tokens in rows.tokens]
    assert min(starts) < 30 and max(starts) > 300 and len(set(starts)) > 60
