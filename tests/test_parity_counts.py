"""The papers' presets have the published numbers of parameters. Shapes only: nothing is allocated."""

import math

import jax
import jax.numpy as jnp
import pytest

from seqmodels.configs import griffin, mamba, mamba2
from seqmodels.model import build

pytestmark = pytest.mark.slow

PUBLISHED = {  # of state-spaces/mamba-*, and of the same sizes in transformers (checked below)
    "130m": 129_135_360,
    "370m": 371_516_416,
    "790m": 793_204_224,
    "1.4b": 1_372_178_432,
    "2.8b": 2_768_345_600,
}


MAMBA2 = {  # of state-spaces/mamba2-*, whose vocabulary is 50,288
    "130m": 128_989_632,
    "370m": 368_346_624,
    "780m": 780_161_280,
    "1.3b": 1_343_757_312,
    "2.7b": 2_702_599_680,
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


@pytest.mark.parametrize("preset", MAMBA2)
def test_mamba2(preset):
    assert count(build(mamba2.get_config(preset).model, 50280)) == MAMBA2[preset]


@pytest.mark.slow
@pytest.mark.parametrize("preset", MAMBA2)
def test_transformers_agrees_on_mamba2(preset):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = mamba2.get_config(preset).model
    sizes = dict(hidden_size=model.width, num_hidden_layers=model.repeats, vocab_size=model.vocab_size)
    heads = dict(num_heads=2 * model.width // 64, head_dim=64, state_size=128, n_groups=1)
    with torch.device("meta"):
        theirs = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes, **heads, tie_word_embeddings=True))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == MAMBA2[preset]


def test_recurrent_gemma():
    """google/recurrentgemma-2b: the default of transformers, but for one head of keys and an MLP of twice the width."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    with torch.device("meta"):
        config = transformers.RecurrentGemmaConfig(num_key_value_heads=1, intermediate_size=15360)
        theirs = transformers.RecurrentGemmaForCausalLM(config)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 2_682_862_080
    assert count(build(griffin.get_config("2b").model, 256_000)) == 2_682_862_080
