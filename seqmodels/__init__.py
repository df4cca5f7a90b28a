"""Sequence models beyond attention, in JAX and Flax: kernels, mixers, configs, training, evaluation and sweeps."""

__version__ = "0.2.0"
