"""The FLOP model against XLA's own count of the compiled step."""

import jax
import jax.numpy as jnp
import pytest

from seqmodels.configs import densemamba, mamba, mamba2, performer, transformer
from seqmodels.depth import vector
from seqmodels.kernels.delta_rule import delta_rule
from seqmodels.kernels.linear_attention import linear_attention
from seqmodels.kernels.selective_scan import selective_scan
from seqmodels.layers.parameter import declarations
from seqmodels.mixers.mamba import SCAN_FLOPS
from seqmodels.mixers.matrix import delta_flops, state_flops
from seqmodels.model import build
from seqmodels.training import flops, sharding
from seqmodels.training.optimizer import make_optimizer, make_schedule
from seqmodels.training.state import abstract_params, abstract_state
from seqmodels.training.step import lower_train_step, make_train_step

pytestmark = pytest.mark.slow


def small(module):
    config = module.get_config().unlock()
    config.batch_size, config.seq_len, config.model.repeats, config.mesh.data = 4, 128, 2, 1
    config.training.loss_chunk = 0  # XLA counts the body of a scan once
    return config


def counts(config):
    """Operations of a step: ours, those of ours in selective scans, and XLA's."""
    model, mesh = build(config.model, 257), sharding.make_mesh(config)
    boxed = abstract_params(model, config)
    optimizer = make_optimizer(config.optimizer, boxed)
    abstract = abstract_state(model, optimizer, config, mesh)
    train_step = make_train_step(model, optimizer, make_schedule(config.optimizer, config.steps), config)
    compiled = lower_train_step(train_step, abstract, config, mesh).compile()
    transitions = sum(leaf.value.size for leaf in declarations(boxed) if leaf.names[-2:] == ("inner", "state"))
    scans = 3 * config.batch_size * config.seq_len * SCAN_FLOPS * transitions
    return flops.train_step_flops(boxed, config), scans, compiled.cost_analysis()["flops"]


def test_transformer_step_is_within_six_percent_of_xla():
    """XLA counts the elementwise operations and the optimizer too, so ours is the lower. Both count hidden scores."""
    config = small(transformer)
    config.model.implementation.attention = "xla"
    ours, scans, xla = counts(config)
    assert scans == 0 and 0.94 * xla < ours < xla


@pytest.mark.slow
def test_mamba_step_without_its_scans_is_within_eight_percent_of_xla():
    """XLA counts one token of every scan, which is nearly nothing."""
    ours, scans, xla = counts(small(mamba))
    assert 0 < scans < 0.2 * ours and 0.92 * xla < ours - scans < xla


@pytest.mark.slow
@pytest.mark.parametrize("module", [mamba2, pytest.param(performer, marks=pytest.mark.slow)])
def test_matrix_state_step_without_its_recurrence_is_within_eight_percent_of_xla(module):
    """Token by token, XLA counts one token of the recurrence, which is nearly nothing."""
    config = small(module)
    config.model.implementation.linear_attention = "reference"
    config.model.width = 256  # in narrower models XLA's elementwise operations are a larger share
    ours, _, xla = counts(config)
    recurrence = (
        3 * config.batch_size * config.seq_len * flops.beyond_products(config.model, config.seq_len)["branches"]
    )
    assert 0 < recurrence < 0.2 * ours and 0.92 * xla < ours - recurrence < xla


@pytest.mark.parametrize("decay", [False, True])
def test_linear_attention_of_one_token_is_what_xla_counts(decay):
    batch, heads, keys, values = 2, 3, 32, 64

    def attend(q, k, v, log_decay, state):
        decays = log_decay if decay else None
        return linear_attention(q, k, v, decays, initial_state=state, implementation="reference")

    shapes = [(batch, 1, heads, keys)] * 2 + [
        (batch, 1, heads, values),
        (batch, 1, heads),
        (batch, heads, keys, values),
    ]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    cost = jax.jit(attend).lower(*arguments).compile().cost_analysis()["flops"]
    elements = batch * heads * keys * values
    assert cost / elements == pytest.approx(state_flops((1,), decay), rel=0.05)


def test_delta_rule_of_one_token_is_what_xla_counts():
    batch, heads, keys, values = 2, 3, 32, 64

    def correct(q, k, a, b, v, log_decay, state):
        return delta_rule(q, k, v, a, b, log_decay, initial_state=state, implementation="reference")

    shapes = [(batch, 1, heads, keys)] * 4 + [
        (batch, 1, heads, values),
        (batch, 1, heads),
        (batch, heads, keys, values),
    ]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    cost = jax.jit(correct).lower(*arguments).compile().cost_analysis()["flops"]
    assert cost / (batch * heads * keys * values) == pytest.approx(delta_flops((1,), True), rel=0.05)


@pytest.mark.parametrize("groups", [1, 3])
def test_selective_scan_of_one_token_is_what_xla_counts(groups):
    """With READ's groups too: each lower state costs as much as the layer's own."""
    batch, inner, state = 64, 16, 256  # so that what is done once for all rows does not count
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    token, input_matrix = array(batch, 1, groups, inner), array(batch, 1, groups, state)

    def scan(u, dt, A, B, C, h):
        return selective_scan(u, dt, A, B, C, initial_state=h, implementation="reference")

    states = (groups, inner, state)
    arguments = (token, token, array(*states), input_matrix, input_matrix, array(batch, *states))
    cost = jax.jit(scan).lower(*arguments).compile().cost_analysis()["flops"]
    ours = SCAN_FLOPS + (groups - 1) * vector.FLOPS["read"]
    assert cost / (batch * inner * state) == pytest.approx(ours, rel=0.02)


def test_dense_links_cost_a_scan_a_source():
    """Four layers of depth two have 0 + 1 + 2 + 2 sources."""
    config = densemamba.get_config()
    assert flops.beyond_products(config.model, 1)["depth"] == 5 * SCAN_FLOPS * 256 * 16
    config.model.dense.variant = "input"
    assert flops.beyond_products(config.model, 1)["depth"] == 0


def test_scan_over_layers_and_tied_tables_count_the_same():
    """Without and with stacked parameters; the head of an untied table costs what the tied one does."""
    config = small(mamba)
    reference = flops.train_step_flops(abstract_params(build(config.model, 257), config), config)
    config.model.scan_blocks = 1
    assert flops.train_step_flops(abstract_params(build(config.model, 257), config), config) == reference
    config.model.tie_embeddings = False
    assert flops.train_step_flops(abstract_params(build(config.model, 257), config), config) == reference


def test_six_times_parameters_a_token():
    """The usual rule, at a size where scans and scores are small: 130m, embedding counted once."""
    config = mamba.get_config("130m")
    boxed = abstract_params(build(config.model, 50277), config)
    total = sum(leaf.size for leaf in jax.tree.leaves(sharding.unbox(boxed)))
    assert 3 * flops.forward_flops_per_token(boxed, config.model, 2048) == pytest.approx(6 * total, rel=0.05)


def test_peaks_by_device_kind():
    assert flops.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert flops.peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert flops.peak_flops("NVIDIA A100-SXM4-80GB", "float32") == 156e12
    assert flops.peak_flops("TPU v5 lite", "bfloat16") == 197e12 and flops.peak_flops("TPU v5p", "bfloat16") == 459e12
    assert flops.peak_flops("cpu", "float32") is None
