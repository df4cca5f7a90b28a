"""Sweeps: lists of ordinary train commands, each run once, whose results are compared at the end (docs/sweeps.md).

A sweep is a directory. Its processes may run on several hosts; they know of each other only through its files.
"""
