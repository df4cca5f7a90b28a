"""Guesses what somebody meant who typed a name that does not exist."""

import difflib
from collections.abc import Sequence


def initials(name: str) -> str:
    """First letters of the words of a field's last part: "lr" of optimizer.learning_rate."""
    return "".join(part[:1] for part in name.split(".")[-1].split("_"))


def nearest(word: str, choices: Sequence[str]) -> str:
    """`; did you mean a or b?`, or what there is if nothing is near."""
    # The last part counts as well as the whole, and so do its initials: `warmup` finds optimizer.warmup, `lr`
    # optimizer.learning_rate.
    near = [choice for choice in choices if initials(choice) == word.split(".")[-1]]
    near += difflib.get_close_matches(word, choices, n=3, cutoff=0.6)
    near += [choice for choice in choices if choice.split(".")[-1] == word.split(".")[-1] and choice not in near]
    if near:
        return f"; did you mean {' or '.join(list(dict.fromkeys(near))[:3])}?"
    return f"; there are {', '.join(choices)}" if len(choices) <= 12 else ""
