"""The registry of operations: what each module declares, and the one wrapper that runs them on a mesh."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from seqmodels import parallel
from seqmodels.kernels import OPERATIONS
from seqmodels.kernels.attention.biases import Alibi
from seqmodels.training.sharding import AXES, RULES

B, T, E = 2, 6, 4
DOCUMENTS = dict(segment_ids=(B, T), mask=(B, T), initial_segment=(B,))
ROW = dict(segment_ids=(B, T), key_segment_ids=(B, 8), key_mask=(B, 8), positions=(B, T), key_positions=(B, 8))
ROW |= dict(bias_weights=(4, 1), gates=(B, T, 4), key_gates=(B, 8, 4))
SHAPES = {  # of every array that an operation takes, and of what it gives
    "selective_scan": (
        dict(u=(B, T, E), dt=(B, T, E), A=(E, 3), B=(B, T, 3), C=(B, T, 3), D=(E,), z=(B, T, E), dt_bias=(E,))
        | dict(initial_state=(B, E, 3), **DOCUMENTS),
        [(B, T, E), (B, E, 3)],
    ),
    "short_conv": (
        dict(x=(B, T, E), weight=(4, E), bias=(E,), initial_state=(B, 3, E), **DOCUMENTS),
        [(B, T, E), (B, 3, E)],
    ),
    "attention": (dict(q=(B, T, 4, 8), k=(B, 8, 2, 8), v=(B, 8, 2, 8), **ROW), [(B, T, 4, 8)]),
    "linear_attention": (
        dict(q=(B, T, 2, 3), k=(B, T, 2, 3), v=(B, T, 4, 5), log_decay=(B, T, 4, 3), bonus=(4, 3))
        | dict(initial_state=(B, 4, 3, 5), **DOCUMENTS),
        [(B, T, 4, 5), (B, 4, 3, 5)],
    ),
    "delta_rule": (
        dict(q=(B, T, 2, 3), k=(B, T, 2, 3), v=(B, T, 4, 5), a=(B, T, 4, 3), b=(B, T, 2, 3), log_decay=(B, T, 4, 3))
        | dict(initial_state=(B, 4, 3, 5), **DOCUMENTS),
        [(B, T, 4, 5), (B, 4, 3, 5)],
    ),
    "linear_scan": (
        dict(log_decay=(B, T, 3, E), x=(B, T, 3, E), initial_state=(B, 3, E), **DOCUMENTS),
        [(B, T, 3, E), (B, 3, E)],
    ),
    "long_conv": (dict(x=(B, T, E), weight=(T, E), skip=(E,), **DOCUMENTS), [(B, T, E)]),
    "hyper_connection": (
        dict(streams=(B, T, 3, E), y=(B, T, E), weights=(B, T, 3), matrix=(3, E, 6))
        | dict(scale=(2,), pre_bias=(3,), post_bias=(3,)),
        [(B, T, 3, E), (B, T, E), (B, T, 3)],
    ),
    "attn_residual": (
        dict(value=(B, T, E), mean_square=(B, T), vectors=(3, E)),
        [*[(B, T, E)] * 3, (3, B, T), (3, B, T)],
    ),
    "grouped_matmul": (dict(x=(7, 5), w=(3, 5, 4), sizes=(3,)), [(7, 4)]),
}


def arrays(operation):
    """Arrays of these shapes, abstract."""
    kinds = dict(mask=bool, key_mask=bool)
    kinds |= dict.fromkeys(
        ("segment_ids", "key_segment_ids", "initial_segment", "positions", "key_positions", "sizes"), "int32"
    )
    shapes, _ = SHAPES[operation]
    return {name: jax.ShapeDtypeStruct(shape, kinds.get(name, "float32")) for name, shape in shapes.items()}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_array_has_its_axes(operation):
    """A name for each axis of each array argument and each result, and the same size wherever a name returns."""
    module, given = OPERATIONS[operation], arrays(operation)
    layout = module.axes(**given)
    function = getattr(module, operation)
    annotated = inspect.signature(function).parameters.values()
    assert set(layout.arrays) == {p.name for p in annotated if "Array" in str(p.annotation)}
    assert set(given) | {"weights"} >= set(layout.arrays)
    options = dict(
        linear_attention=dict(read="exclusive"),
        attention=dict(bias=Alibi()),
        hyper_connection=dict(eps=0.1),
        attn_residual=dict(eps=0.1),
    )
    options = options.get(operation, {})
    results = jax.tree.leaves(jax.eval_shape(lambda **x: function(**x, **options), **given))
    assert [x.shape for x in results] == SHAPES[operation][1]
    sizes = {}
    axes = [layout.arrays[name] for name in given] + list(layout.results)
    for names, x in zip(axes, [*given.values(), *results], strict=True):
        for name, size in zip(names, x.shape, strict=True):
            assert name is None or sizes.setdefault(name, size) == size


@pytest.mark.parametrize("decay, rank", [((4,), 1), ((B, T, 4), 3), ((B, T, 4, 3), 4)])
def test_axes_follow_the_rank(decay, rank):
    log_decay = jax.ShapeDtypeStruct(decay, "float32")
    layout = OPERATIONS["linear_attention"].axes(log_decay=log_decay)
    assert len(layout.arrays["log_decay"]) == rank
    assert "heads" in layout.arrays["log_decay"]
    grouped = OPERATIONS["selective_scan"].axes(u=jax.ShapeDtypeStruct((B, T, 3, E), "float32"))
    assert grouped.arrays["u"] == ("batch", "length", None, "inner")
    assert grouped.results == (("batch", "length", "inner"), ("batch", None, "inner", None))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_wrapper_has_the_kernels_signature(operation):
    assert inspect.signature(getattr(parallel, operation)) == inspect.signature(
        getattr(OPERATIONS[operation], operation)
    )


def test_unknown_operations_are_named():
    with pytest.raises(KeyError, match="'fft' is no operation; there are selective_scan, short_conv"):
        OPERATIONS["fft"]
    with pytest.raises(AttributeError, match="fft"):
        _ = parallel.fft


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("sizes", [dict(data=2, tensor=2), dict(data=2, tensor=4), dict(data=2, sequence=4)], ids=str)
def test_attention_on_a_mesh(sizes):
    """Rows and heads apart where they divide, keys with their queries; time stays whole."""
    draw = np.random.default_rng(0)
    heads = dict(q=4, k=2, v=2)
    q, k, v = (jnp.asarray(draw.normal(size=(4, 8, n, 4)), jnp.float32) for n in heads.values())
    positions = jnp.asarray(draw.permuted(np.tile(np.arange(8), (4, 1)), axis=1), jnp.int32)

    def run(function):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(function(q, k, v, positions=positions, window=5, implementation="xla")))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

    want = run(OPERATIONS["attention"].attention)
    shape = [sizes.get(axis, 1) for axis in AXES]
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        got = run(parallel.attention)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), got, want)
