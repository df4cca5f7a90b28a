"""The error that a user can put right, and errors in one line."""

import traceback
from pathlib import Path

LONGEST = 400  # characters of a message
NOT_FINITE = "not finite"  # in the line that tells of a run whose numbers are not; sweeps look for it


class UserError(Exception):
    """Bad input: one line that names the field, the value and what is allowed.

    `train.py`, `eval.py` and `sweep.py` print it on stderr without a traceback and exit with status 1.
    """


def describe(error: BaseException) -> str:
    """An error in one line: the message of a UserError; of others also their type and where they come from."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"
