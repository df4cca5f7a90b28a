"""Questions about long texts: answers that a reader finds in the text, lengths, and the command that writes them."""

import collections
import json
import re

import pytest

from seqmodels.data.questions import TASKS, line
from seqmodels.data.questions.__main__ import longest, main
from seqmodels.data.questions.hay import NOISE
from seqmodels.data.tokenizer import load_tokenizer
from seqmodels.evals import qa


def find_needles(text, question):
    """Numbers of the words that are asked for, by name."""
    (names,) = re.findall(r"magic \w+ for (.*) in the text", question)
    told = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", text)
    return [value for key, value in told if key in re.split(", | and ", names)]


def find_variables(text, question):
    values = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
        values[name] = values.get(source, source)
    (value,) = re.findall(r"the value (\d+)", question)
    return [name for name in values if values[name] == value]


def find_common(text, question):
    counts = collections.Counter(re.findall(r"\d+\. (\S+)", text))
    (first, *_), last = counts.most_common(10), counts.most_common(11)[10]
    assert first[1] == 30 and last[1] == 3
    return [word for word, _ in counts.most_common(10)]


def find_frequent(text, question):
    counts = collections.Counter(text.split("\n")[1].split())
    order = counts.most_common(5)
    assert order[0][0] == "..." and order[3][1] > order[4][1]
    return [word for word, _ in order[1:4]]


def find_in_world(text, question):
    """Replays the story; what is carried moves along."""
    where, holder, seen = {}, {}, collections.defaultdict(list)
    actors = "Mary|John|Daniel|Sandra"
    told = rf"({actors}) (moved to|went to|journeyed to|travelled to|went back to|got|dropped) the (\w+)(?: there)?\."
    for actor, verb, what in re.findall(told, text):
        if verb == "got":
            holder[what] = actor
            seen[what].append(where[actor])
        elif verb == "dropped":
            del holder[what]
        else:
            where[actor] = what
            for thing in (t for t, a in holder.items() if a == actor):
                seen[thing].append(what)
    if found := re.fullmatch(r"Where is (\w+)\?", question):
        return [where[found[1]]]
    if found := re.fullmatch(r"Where is the (\w+)\?", question):
        return [seen[found[1]][-1]]
    thing, place = re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question).groups()
    places = [p for i, p in enumerate(seen[thing]) if i == 0 or seen[thing][i - 1] != p]
    return [places[places.index(place) - 1]]


def reader(name):
    if name.startswith("niah"):
        return find_needles
    if name.startswith("qa"):
        return find_in_world
    return dict(vt=find_variables, cwe=find_common, fwe=find_frequent)[name]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "phone_book"])
def test_a_reader_finds_the_answers(name):
    for row in range(20):
        for count in (200, 50):
            fields = line(TASKS[name], [0, row], count)
            assert sorted(reader(name)(fields["context"], fields["question"])) == sorted(fields["answers"])
            assert fields == line(TASKS[name], [0, row], count) != line(TASKS[name], [1, row], count)


def test_phone_book():
    fields = line(TASKS["phone_book"], [0], 100)
    book = dict(entry.split(": ") for entry in fields["context"].split("\n"))
    assert len(book) == 103 and all(re.fullmatch(r"[6-9]\d{9}", number) for number in book.values())
    assert book[fields["answer_prefix"].removesuffix(":")] == fields["answers"][0]
    assert all(book[name] == number for name, number in (e.split(": ") for e in fields["question"].split("\n")))


def test_needles_stand_anywhere():
    """The first and the last third of the text, and between, each as often, within five standard deviations."""
    thirds = collections.Counter()
    for row in range(300):
        context = line(TASKS["niah_single_1"], [0, row], 99)["context"]
        before = context[: context.index("One of the")].count(".") - 1
        thirds[before // 34] += 1
    assert all(abs(thirds[i] - 100) < 5 * 8.2 for i in range(3)), thirds
    assert NOISE[0] in context


def test_texts_fill_the_length():
    tokenizer = load_tokenizer("bytes")
    for name in ("niah_multikey_2", "vt", "qa2", "phone_book"):
        for length in (1500, 3000):
            question = qa.Question(**longest(name, tokenizer, [0], length))
            prompt, cut = qa.prompt_of(tokenizer, question, shots=0, repeat=1, length=None)
            size = len(prompt) + len(" " + ", ".join(question.answers))
            assert length - 400 < size <= length and not cut  # one more sentence would not fit


def test_the_command_writes_files(tmp_path, capsys):
    assert main(["--tasks=vt,qa1", "--lengths=800,900", "--rows=2", f"--out={tmp_path}"]) == 0
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["qa1_800.jsonl", "qa1_900.jsonl", "vt_800.jsonl", "vt_900.jsonl"]
    assert len(qa.read(tmp_path / "vt_800.jsonl")) == 2
    first = json.loads((tmp_path / "vt_800.jsonl").read_text().splitlines()[0])
    assert main(["--tasks=vt", "--lengths=800", "--rows=2", "--seed=1", f"--out={tmp_path}"]) == 0
    assert json.loads((tmp_path / "vt_800.jsonl").read_text().splitlines()[0]) != first
    capsys.readouterr()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tasks=vtt"], "--tasks=vtt: must be one or more of niah_single_1"),
        (["--lengths=10,x"], "--lengths=10,x: must be numbers of tokens"),
        (["--rows=0"], "--rows=0: must be at least 1"),
        (["--tasks=qa1,cwe", "--lengths=900"], r"--lengths=900: must be at least \d{4} for --tasks=cwe$"),
        (["--tokenizer=/none.json"], "/none.json"),
    ],
)
def test_bad_flags_are_named(tmp_path, capsys, flags, message):
    assert main([*flags, f"--out={tmp_path}"]) == 1
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
