"""What branches report beside their output: through every kind of stack, micro-batches, meshes, up to the metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from seqmodels import backbone
from seqmodels.configs import mamba
from seqmodels.data import ArraySpec
from seqmodels.mixers.linear_attention import LinearAttention
from seqmodels.model import build
from seqmodels.training import loop, metrics, sharding, side
from seqmodels.training.optimizer import decay_mask, make_optimizer, make_schedule
from seqmodels.training.state import abstract_params, abstract_state, init_state
from seqmodels.training.step import lower_train_step, make_train_step
