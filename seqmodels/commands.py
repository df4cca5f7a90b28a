"""Entry points of the commands. Each first says what freed memory and a signal do, and then imports the command."""

import importlib

from seqmodels import heap, interrupt


def train() -> int:
    """seqmodels/scripts/train.py."""
    return _command("train")


def evaluate() -> int:
    """seqmodels/scripts/eval.py."""
    return _command("eval")


def sweep() -> int:
    """seqmodels/scripts/sweep.py."""
    return _command("sweep")


def convert() -> int:
    """seqmodels/scripts/convert.py."""
    return _command("convert")


def _command(name: str) -> int:
    heap.keep_freed_memory()  # of a CPU; before the first thread
    interrupt.install()
    return importlib.import_module(f"seqmodels.scripts.{name}").command()
