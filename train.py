"""Trains a model: python train.py --help. The command itself is seqmodels/scripts/train.py."""

import sys

from seqmodels.scripts.train import command

if __name__ == "__main__":
    sys.exit(command())
