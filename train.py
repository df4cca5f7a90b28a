"""Trains a model: python train.py --help. The command itself is seqmodels/scripts/train.py."""

import sys

from seqmodels.commands import train

if __name__ == "__main__":
    sys.exit(train())
