"""Branches that mix time. seqmodels/branches.py lists them by name."""
