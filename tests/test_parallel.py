"""Models on a mesh equal models on one device, in value and gradient: rows, channels and time split together."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from seqmodels import parallel
from seqmodels.configs import densemamba, mamba
from seqmodels.model import build
from seqmodels.training.sharding import AXES, RULES, param_shardings, tokens_sharding, unbox

B, T, VOCAB = 4, 16, 11

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

MODELS = {
    "mamba": (mamba, {}, {}),
    "densemamba, scanned over, rematerialised": (densemamba, dict(scan_blocks=1, remat="streams", repeats=3), {}),
    "densemamba, all gates": (densemamba, {}, dict(gate="both", projection="linear", per_source=True)),
    "densemamba, norms": (densemamba, {}, dict(norm=True)),
    "densemamba, input": (densemamba, {}, dict(variant="input")),
    "densemamba, output": (densemamba, {}, dict(variant="output")),
    "densemamba, rank": (densemamba, {}, dict(variant="rank")),
    "densemamba, carry": (densemamba, {}, dict(variant="carry")),
    "denseformer": (mamba, dict(depth="denseformer"), {}),
    "attnres": (mamba, dict(depth="attnres", attnres=dict(blocks=2)), {}),
    "attnres, scanned over": (mamba, dict(depth="attnres", attnres=dict(form="full"), scan_blocks=1), {}),
    "value": (mamba, dict(depth="value"), {}),
    "mudd": (mamba, dict(depth="mudd"), {}),
    "hyper": (mamba, dict(depth="hyper", hyper=dict(streams=2, mixing="sinkhorn")), {}),
}
QUICK = ("mamba", "densemamba, all gates")


def make_mesh(**sizes):
    """The training mesh's five axes, of size 1 unless given."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def make(name):
    """A small model, its boxed abstract parameters, and perturbed ones: fresh gates are zero and hide bugs."""
    module, model, dense = MODELS[name]
    config = module.get_config().model.copy_and_resolve_references()
    with config.unlocked():
        config.update(dict(width=8, repeats=2) | model)
        config.mamba.update(dict(state=3, dt_rank=2))
        config.dense.update(dict(depth=2, bottleneck=2, **dense))
    built = build(config, VOCAB)
    boxed = jax.eval_shape(built.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    draw = np.random.default_rng(1)

    def perturbed(path, x):
        start = {"A_log": 0.5, "dt_bias": -2.0, "D": 1.0, "scale": 1.0}.get(path[-1].key, 0.0)
        return jnp.asarray(start + 0.3 * draw.normal(size=x.shape), jnp.float32)

    return built, boxed, jax.tree.map_with_path(perturbed, nn.unbox(boxed))


def batch(masked=False):
    draw = np.random.default_rng(5)
    out = dict(tokens=jnp.asarray(draw.integers(0, VOCAB, (B, T)), jnp.int32))
    out["segment_ids"] = jnp.asarray(np.cumsum(draw.random((B, T)) < 0.15, axis=1), jnp.int32)
    if masked:
        out["mask"] = jnp.asarray(draw.random((B, T)) < 0.7)
    return out


def value_and_gradients(built, params, rows, state):
    def loss(params, state):
        hidden, new = built.apply(params, **rows, state=state)
        hidden = jnp.where(rows["mask"][..., None], hidden, 0) if "mask" in rows else hidden
        draw = np.random.default_rng(9)
        out = hidden, new["layers"]
        return sum(jnp.sum(x * jnp.asarray(draw.normal(size=x.shape), x.dtype)) for x in jax.tree.leaves(out)), out

    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)(params, state)
    return out, (gradients[0], gradients[1]["layers"])


def start_state(built):
    """A state that is not zero, of the first rows' documents and of others."""
    state = built.init_state(B)
    draw = np.random.default_rng(3)
    layers = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype), state["layers"])
    return dict(state, layers=layers, segment=jnp.asarray([0, 0, 5, 0], jnp.int32))


def assert_mesh_changes_nothing(name, mesh, masked):
    built, boxed, params = make(name)
    rows, state = batch(masked), start_state(built)
    step = jax.jit(functools.partial(value_and_gradients, built))
    want = step(params, rows, state)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        place = NamedSharding(mesh, tokens_sharding(mesh).spec)
        got = step(
            jax.device_put(params, unbox(param_shardings(boxed, mesh))),
            {name: jax.device_put(x, place) for name, x in rows.items()},
            state,
        )
    # Some gradients are zero but for rounding, as that of how hyper-connections mix streams that are still equal.
    smallest = 1e-3 * max(1, *(float(np.linalg.norm(y)) for y in jax.tree.leaves(want)))
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        error = np.linalg.norm(x - y) / max(np.linalg.norm(y), smallest)
        assert error < 1e-4, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in MODELS])
def test_mesh_changes_nothing(name):
    assert_mesh_changes_nothing(name, make_mesh(data=2, tensor=2, sequence=2), masked=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [dict(sequence=8), dict(data=2, fsdp=2, sequence=2), dict(expert=2, sequence=4)], ids=str
)
def test_masked_batch_on_other_meshes(sizes):
    assert_mesh_changes_nothing("mamba", make_mesh(**sizes), masked=True)


def kernels_in_shard_maps(mesh, rows, length):
    """Whether the traced model has shard_maps, and whether time is gathered inside them."""
    built, _, params = make("mamba")
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        text = str(jax.make_jaxpr(built.apply)(params, jnp.zeros((rows, length), jnp.int32)))
    return "shard_map" in text, bool(re.search(r"all_gather", text))


def test_what_is_split():
    assert kernels_in_shard_maps(make_mesh(data=2, sequence=2), B, T) == (True, True)
    assert kernels_in_shard_maps(make_mesh(data=2, sequence=2), B, T - 1) == (True, False)  # does not divide
    assert kernels_in_shard_maps(make_mesh(data=2), B, T) == (True, False)
    assert kernels_in_shard_maps(make_mesh(tensor=2), 1, 1) == (True, False)  # a step of generation
    assert kernels_in_shard_maps(make_mesh(), B, T) == (False, False)


def test_mesh_axes_follow_the_rules():
    mesh = make_mesh(data=2, fsdp=2, sequence=2)
    sizes = dict(batch=4, length=6, inner=8)
    assert parallel.mesh_axes(**sizes) is None
    with jax.set_mesh(mesh):
        assert parallel.mesh_axes(**sizes) is None  # no rules
        with nn.logical_axis_rules(RULES):
            assert parallel.mesh_axes(**sizes) == dict(batch=("data", "fsdp"), length=("sequence",))
            assert parallel.mesh_axes(batch=3, length=5, inner=7) == {}
