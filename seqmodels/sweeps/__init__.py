"""Sweeps: lists of ordinary train commands, run once each, and lined up at the end (docs/sweeps.md).

A sweep is a directory. What is in it is all that its processes, on whatever hosts, know of each other.
"""
