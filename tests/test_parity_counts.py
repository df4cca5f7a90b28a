"""The papers' presets have the published numbers of parameters. Shapes only: nothing is allocated."""

import math

import jax
import jax.numpy as jnp
import pytest

from configs import mamba
from seqmodels.model import build

PUBLISHED = {  # of state-spaces/mamba-*, and of the same sizes in transformers (checked below)
    "130m": 129_135_360,
    "370m": 371_516_416,
    "790m": 793_204_224,
    "1.4b": 1_372_178_432,
    "2.8b": 2_768_345_600,
}


def count(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("preset", PUBLISHED)
def test_mamba(preset):
    assert count(build(mamba.get_config(preset).model, 50280)) == PUBLISHED[preset]


@pytest.mark.slow
@pytest.mark.parametrize("preset", PUBLISHED)
def test_transformers_agrees(preset):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = mamba.get_config(preset).model
    config = transformers.MambaConfig(hidden_size=model.width, num_hidden_layers=model.repeats, vocab_size=50280)
    with torch.device("meta"):
        theirs = transformers.MambaForCausalLM(config)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == PUBLISHED[preset]
