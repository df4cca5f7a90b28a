"""Branches that mix channels. In a block they follow a mixer."""
