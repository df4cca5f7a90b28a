"""Questions about long texts, made by the project: the tasks of RULER, three of bAbI's worlds, and a phone book.

The lines are for the evaluator `qa` (docs/evaluation.md). A new task is a file here and a line in TASKS.
"""

from seqmodels.data.questions.frequent import CommonWords, FrequentWords
from seqmodels.data.questions.needles import Needles
from seqmodels.data.questions.phone_book import PhoneBook
from seqmodels.data.questions.question import Asked, Task, line
from seqmodels.data.questions.variables import Variables
from seqmodels.data.questions.worlds import World

TASKS: dict[str, Task] = {
    # RULER, without its two that need question sets
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", kind="uuid"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", kind="uuid"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, queries=4),
    "vt": Variables(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
    # bAbI's worlds in a book
    "qa1": World(1),
    "qa2": World(2, actions=20),
    "qa3": World(3, actions=40),
    "phone_book": PhoneBook(),
}

__all__ = ["TASKS", "Asked", "Task", "line"]
