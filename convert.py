"""Weights from and to Hugging Face: python convert.py --help. The command itself is seqmodels/scripts/convert.py."""

import sys

from seqmodels.commands import convert

if __name__ == "__main__":
    sys.exit(convert())
