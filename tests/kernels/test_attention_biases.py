"""Biases and caps of scores against transformers; the other formulas are in attention_cases.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels.attention import attention
from seqmodels.kernels.attention.biases import Alibi, Buckets, alibi_slopes
from tests.kernels.attention_cases import inputs
from tests.kernels.helpers import assert_close

T = 150


@pytest.mark.slow  # transformers takes long to import
@pytest.mark.parametrize("heads", [1, 4, 6, 12, 16])
def test_alibi_is_blooms(heads):
    """Its bias is -slope times the distance, up to a number for each query, which the softmax does not see."""
    torch = pytest.importorskip("torch")
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    theirs = bloom.build_alibi_tensor(torch.ones(1, T), heads, torch.float32).numpy().reshape(heads, T)
    where = np.arange(T)
    ours = np.stack([Alibi()(w, where[:, None], where[None]) for w in alibi_slopes(heads)])
    last = np.tril(np.ones((T, T), bool))
    expected = theirs[:, None, :] - theirs[:, :, None]  # 0 at the query itself
    np.testing.assert_allclose(ours[:, last], expected[:, last], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("count, farthest", [(32, 128), (8, 20)])
def test_buckets_are_t5s(causal, count, farthest):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    theirs = t5.T5Attention._relative_position_bucket(
        torch.tensor(j - i), bidirectional=not causal, num_buckets=count, max_distance=farthest
    )
    np.testing.assert_array_equal(Buckets(count, farthest, causal).bucket(i, j), theirs.numpy())


@pytest.mark.slow
def test_softcap_is_gemma_2s():
    """With a window, grouped heads, and gradients."""
    torch = pytest.importorskip("torch")
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    args = {name: value * 2 for name, value in inputs().items()}
    length, groups = args["q"].shape[1], args["q"].shape[2] // args["k"].shape[2]
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    mask = torch.tensor(np.where((distance >= 0) & (distance < 3), 0.0, -1e30)).float()
    theirs = {name: torch.tensor(x).transpose(1, 2).requires_grad_() for name, x in args.items()}
    module = torch.nn.Module()
    module.num_key_value_groups, module.head_dim, module.training = groups, args["q"].shape[3], False
    want, _ = gemma.eager_attention_forward(module, *theirs.values(), mask, scaling=0.3, softcap=2.5)
    (want * torch.cos(want)).sum().backward()

    def loss(args):
        o = attention(**args, window=3, scale=0.3, softcap=2.5, implementation="xla")
        return jnp.sum(o * jnp.cos(o)), o

    with jax.default_matmul_precision("highest"):  # a GPU rounds float32 to 11 bits else
        gradients, o = jax.jit(jax.grad(loss, has_aux=True))(args)
    assert_close(o, want.detach().numpy(), 2e-6)
    assert_close(gradients, {name: x.grad.transpose(1, 2).numpy() for name, x in theirs.items()}, 5e-6)


def test_bad_options_are_named():
    args = inputs()
    with pytest.raises(ValueError, match="belong together, and bias_weights is missing"):
        attention(**args, bias=Alibi())
    with pytest.raises(ValueError, match="belong together, and bias is missing"):
        attention(**args, bias_weights=np.ones((4, 1)))
    with pytest.raises(ValueError, match=r"bias_weights must be \(4, 1\), got \(2, 1\)"):
        attention(**args, bias=Alibi(), bias_weights=np.ones((2, 1)))
    with pytest.raises(ValueError, match=r"gates must be \(2, 5, 4\), got \(2, 5, 2\)"):
        attention(**args, gates=np.ones((2, 5, 2)))
    with pytest.raises(ValueError, match="key_gates were given without gates"):
        attention(**args, key_gates=np.ones((2, 5, 4)))
    with pytest.raises(ValueError, match=r"softcap must be greater than 0, got 0\.0"):
        attention(**args, softcap=0.0)
    with pytest.raises(ValueError, match="count of buckets must be a multiple of 4, got 6"):
        Buckets(6)
