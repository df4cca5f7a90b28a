"""Runs the trials of a sweep: python sweep.py --help. The command itself is seqmodels/scripts/sweep.py."""

import sys

from seqmodels.commands import sweep

if __name__ == "__main__":
    sys.exit(sweep())
