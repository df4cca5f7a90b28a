"""The error that a user can put right."""


class UserError(Exception):
    """Bad input: one line that names the field, the value and what is allowed.

    `train.py`, `eval.py` and `sweep.py` print it on stderr without a traceback and exit with status 1.
    """


NOT_FINITE = "not finite"  # in the line that tells of a run whose numbers are not; sweeps look for it
