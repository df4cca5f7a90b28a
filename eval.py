"""Evaluates a trained model: python eval.py --help. The command itself is seqmodels/scripts/eval.py."""

import sys

from seqmodels.commands import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
