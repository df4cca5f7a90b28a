"""Evaluates a trained model: python eval.py --help. The command itself is seqmodels/scripts/eval.py."""

import sys

from seqmodels.scripts.eval import command

if __name__ == "__main__":
    sys.exit(command())
