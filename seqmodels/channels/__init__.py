"""Branches that mix channels: what stands behind a mixer in a block."""
