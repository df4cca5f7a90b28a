"""The commands train, eval, sweep and convert.

In a checkout one types `python train.py`; where the package is installed, `seqmodels-train` or
`python -m seqmodels.scripts.train`. All three are the same function.
"""

import re
import shlex
import sys
from pathlib import Path

from seqmodels import interrupt

if sys.argv[0] == "-m":  # `python -m seqmodels.scripts.train`, before its imports; seqmodels/commands.py for the others
    interrupt.install()

_ROOT = Path(__file__).resolve().parents[2]

# The folder with train.py and eval.py, or None where the package is installed without its repository.
CHECKOUT: Path | None = _ROOT if all((_ROOT / name).is_file() for name in ("pyproject.toml", "train.py")) else None


def as_typed(doc: str, argv: list[str] | None = None) -> str:
    """The text of --help with the commands as they are typed here: those of a checkout, or the installed ones.

    Args:
      doc: a script's docstring, which names the commands of a checkout.
      argv: program name and arguments; sys.argv if None.
    """
    if _is_file(sys.argv if argv is None else argv):
        return doc
    doc = re.sub(r"python (train|eval|sweep|convert)\.py", r"seqmodels-\1", doc)
    return re.sub(r"--config=configs/(\w+)\.py", r"--config=\1", doc)


def command_line(argv: list[str] | None = None) -> str:
    """The command that started this process, to be shown and repeated. `argv` as in `as_typed`."""
    argv = sys.argv if argv is None else argv
    if _is_file(argv):
        return "python " + shlex.join(argv)
    return shlex.join(["seqmodels-" + Path(argv[0]).stem.removeprefix("seqmodels-"), *argv[1:]])


def _is_file(argv: list[str]) -> bool:
    """Whether the command was typed as `python train.py` in a checkout."""
    return CHECKOUT is not None and argv[0].endswith(".py")
