"""What devices send each other: how it is read from a program, and what a training step may send by axis."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from seqmodels import configs
from seqmodels.errors import UserError
from seqmodels.layers.lookup import lookup
from seqmodels.model import build
from seqmodels.training import foresee, sharding, topology, xla
from seqmodels.training.collectives import by_axis, collectives
from seqmodels.training.optimizer import make_optimizer, make_schedule
from seqmodels.training.state import abstract_params, abstract_state, init_state
from seqmodels.training.step import lower_train_step, make_train_step
from tests.kernels.helpers import needs_libtpu
from tests.training_model import random_batch

CUBE = AbstractMesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)

# As compilers write them: for CPUs, for GPUs (0.11: starts return their inputs, too) and for TPUs.
HLO = """HloModule step
%more (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %g = f32[8,2]{1,0} all-gather(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}
%bound (x: f32[4]) -> pred[] {
  %n = s32[] constant(5)
}
%again (x: f32[4]) -> f32[4] {
  %p = bf16[10]{0} collective-permute(%x), source_target_pairs={{0,2},{1,3},{4,6},{5,7}}
}
%reduced (x: f32[4]) -> f32[4] {
  %r = f32[8]{0} all-reduce(%x), replica_groups=[2,4]<=[8]
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %w = f32[4] while(%x), condition=%bound, body=%more, backend_config={"known_trip_count":{"n":"3"}}
  %v = f32[4] while(%x), condition=%bound, body=%again
  %a = ((f32[6]{0}, f32[2]{0}), (f32[6]{0}, f32[2]{0})) all-reduce-start(%x), replica_groups=[4,2]<=[2,2,2]T(1,2,0)
  %s = ((bf16[8]{0}), bf16[4]{0}) reduce-scatter-start(%x), replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}
  %f = f32[2]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %d = f32[4] all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}
  %b = f32[16] all-gather(%x), channel_id=7, replica_groups=[4,2]<=[8], frontend_attributes={chain_id="1"}
  %e = f32[16] all-gather(%x), channel_id=7, replica_groups=[4,2]<=[8], frontend_attributes={chain_id="1"}
}
%all-reduce-scatter.1 (x: f32[16]) -> f32[2] {
  %q = f32[16]{0} all-reduce(%x), replica_groups={{0,1,2,3,4,5,6,7}}
}
"""


def test_collectives_are_read_from_programs():
    found = {(c.kind, c.axes): (c.bytes, c.times) for c in reversed(collectives(HLO, CUBE))}
    assert found == {
        ("all-gather", "c"): (32.0, 3),  # half of 16 numbers, in a loop
        ("collective-permute", "b"): (20.0, 5),  # the bound stands in the condition
        ("all-reduce", "a"): (32.0, 1),  # twice half of 8 numbers, each counted once
        ("reduce-scatter", "b"): (8.0, 1),
        ("reduce-scatter", "a+b+c"): (2 * 4 * 8 * 7 / 8, 1),  # eight devices get 2 numbers each, counted once
    }
    assert by_axis(collectives(HLO, CUBE))["c"] == {"all-gather": (4, 128)}  # one more, which goes on later


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_embedding_loss_and_optimizer_stay_within_their_budget():
    """A step of two layers, scanned over, on three axes at once: bytes that a device receives, against the formulas."""
    mesh = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.sequence": 2}
    model = {"model.width": 16, "model.repeats": 2, "model.scan_blocks": 1, "model.vocab_size": 512}
    sizes = {"batch_size": 4, "seq_len": 24, "training.loss_chunk": 8, "model.mlp.hidden": 32, "model.remat": "block"}
    config = configs.transformer(**{"model.pattern": "mlp"}, **mesh, **model, **sizes)
    mesh = sharding.make_mesh(config)
    model = build(config.model, 512)
    boxed = abstract_params(model, config)
    optimizer = make_optimizer(config.optimizer, boxed)
    state = abstract_state(model, optimizer, config, mesh, boxed)
    moments = [leaf.sharding.spec for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (512, 16)]
    assert moments == [state.params["embedding"].sharding.spec] * 2 == [P("tensor", "fsdp")] * 2
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        step = make_train_step(model, optimizer, make_schedule(config.optimizer, config.steps), config, boxed)
        found = collectives(lower_train_step(step, state, config, mesh).compile().as_text(), mesh)

    moved = {}
    for each in found:
        for axis in each.axes.split("+"):
            moved.setdefault(axis, {}).setdefault(each.kind, []).append(each)
    tokens, width, table, size = 2 * 12, 16, 512 * 16 * 4, sum(x.size for x in jax.tree.leaves(state.params)) * 4
    stream = tokens * width * 4  # bytes of the hidden states of a device
    total = lambda axis, kind: sum(each.moved for each in moved[axis].get(kind, ()))  # noqa: E731

    assert set(moved["sequence"]) == {"all-reduce"}  # nothing of time: only sums of gradients
    assert total("sequence", "all-reduce") < 1.1 * size
    # Half of a device's columns of the table once, for the logits, and of the layers' matrices forward and backward.
    layers = (size - table) / 2
    assert total("fsdp", "all-gather") < (table / 2 + 2 * layers) / 2 + stream
    assert total("fsdp", "all-to-all") <= 2 * stream  # rows of the table to their tokens, and their gradients back
    assert sum(each.times for each in moved["fsdp"]["all-gather"] if "[256,16]" in each.arrays) == 1
    # Of tensor the hidden states: of the look-up, one way; of each layer and the logits' gradient.
    assert total("tensor", "all-reduce") < (2 + 2 * 2 + 1) * 2 * stream + 0.25 * size
    assert "all-gather" not in moved["tensor"] or total("tensor", "all-gather") < stream / 4


def one_step(**fields):
    """Abstract parameters, collectives, and the metrics of a step of one layer of minGRU."""
    sizes = {"model.width": 16, "model.repeats": 1, "model.vocab_size": 64, "batch_size": 8, "seq_len": 12}
    config = configs.mingru(**sizes, **fields)
    mesh = sharding.make_mesh(config)
    model = build(config.model, 64)
    boxed = abstract_params(model, config)
    optimizer = make_optimizer(config.optimizer, boxed)
    abstract = abstract_state(model, optimizer, config, mesh, boxed)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        step = make_train_step(model, optimizer, make_schedule(config.optimizer, config.steps), config, boxed)
        compiled = lower_train_step(step, abstract, config, mesh).compile()
        state = init_state(model, optimizer, config, abstract)
        batch = random_batch(0, config, 64)
        batch["targets"][: config.batch_size // 2, ::3] = -1  # devices have different numbers of targets
        _, metrics = compiled(state, sharding.put_batch(batch, mesh))
    return abstract.params, collectives(compiled.as_text(), mesh), {k: float(v) for k, v in metrics.items()}


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_micro_batches_add_up_gradients_over_data_once():
    """After the last one, in float32: bytes of what a device holds, however many micro-batches there are."""
    *_, alone = one_step(**{"mesh.data": 1})
    meshes = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.sequence": 2}
    params, found, metrics = one_step(**meshes, **{"training.accumulate": 2})
    assert metrics == pytest.approx(alone, rel=2e-6)
    over_data = [each for each in found if "data" in each.axes.split("+")]
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(params)) * 4
    assert {(each.axes, each.kind, each.times) for each in over_data} == {("data", "all-reduce", 1)}
    assert held <= sum(each.moved for each in over_data) < 1.01 * held
    assert max(each.times for each in found) == 2  # what the other axes exchange for each micro-batch


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_look_up_on_a_mesh_is_that_of_one_device():
    """Values and gradients, of ids that occur several times, count from the end, or are outside of the table."""
    draw = np.random.default_rng(0)
    table = draw.normal(size=(12, 6)).astype(np.float32)
    ids = draw.integers(-12, 12, (4, 6)).astype(np.int32)
    ids[0, 0], ids[3, 5] = 12, -13
    weights = draw.normal(size=(4, 6, 6)).astype(np.float32)

    def values(find):
        y = find(table, ids)
        total = lambda table: jnp.where(jnp.isnan(y), 0, weights * find(table, ids)).sum()  # noqa: E731
        return y, jax.grad(total)(table)

    want = jax.jit(lambda: values(lambda table, ids: jnp.take(table, ids, axis=0)))()
    mesh = jax.make_mesh((1, 1, 2, 2, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 5)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        got = jax.jit(lambda: values(lookup))()
    assert np.isnan(want[0][0, 0]).all() and np.isnan(want[0]).sum() == 12
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want)


def test_large_parameters_without_an_axis_for_fsdp_are_split_too():
    mesh = AbstractMesh((1, 1, 4, 2, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 5)
    spec = lambda names, *shape: sharding.parameter_spec(names, shape, mesh)  # noqa: E731
    assert spec(("inner", None), 4096, 160) == P(("tensor", "fsdp"), None)
    assert spec(("layers", "rank", "inner"), 48, 160, 4096) == P(None, None, ("tensor", "fsdp"))
    assert spec(("inner", None), 64, 160) == P("tensor", None)  # small
    assert spec(("embed", "inner"), 4096, 4096) == P("fsdp", "tensor")


def test_a_topology_is_read_and_the_mesh_must_take_it_all():
    assert topology.parse("v5p:8x8x4").size == 256
    assert topology.parse("h100:64").shape == (8, 8)
    for text in ("v5p:64", "h100:12", "h100:8x8", "v9:4", "v5e:00x4", ""):
        with pytest.raises(UserError, match=f"^--topology={text}: "):
            topology.parse(text)
    config = configs.mamba(**{"mesh.fsdp": 4})
    assert foresee.fitted(config, topology.parse("h200:8")).mesh.data == 2
    with pytest.raises(UserError, match=r"has 2 chips, and config.mesh \(data=-1, fsdp=4\) does not take them all"):
        foresee.fitted(config, topology.parse("h200:2"))


def test_bandwidth_follows_what_connects_the_chips():
    torus, hosts = topology.parse("v5p:4x4x4"), topology.parse("h100:16")
    assert torus.bandwidth([0, 1, 2, 3]) == 1.8e11
    assert torus.bandwidth(list(range(64))) == 3 * 1.8e11
    assert hosts.bandwidth([0, 7]) == 4.5e11 and hosts.bandwidth([0, 8]) == 5e10


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:4x4", "v5p:4x4x4", "v6e:4x4"])
def test_options_are_those_that_libtpu_takes_for_the_chip(name):
    """On a mesh that splits an axis of the torus: products of a matrix that fsdp splits, which devices gather."""
    chips = topology.parse(name)
    topology.prepare(chips)
    config = configs.mamba(**{"mesh.data": chips.size // 16, "mesh.fsdp": 8, "mesh.tensor": 2, "batch_size": 32})
    mesh = sharding.make_mesh(config, topology.devices(chips))
    rows, columns = (jax.NamedSharding(mesh, spec) for spec in (P("fsdp"), P(None, "fsdp")))
    x, w = (jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=each) for each in (rows, columns))
    step = jax.jit(lambda x, w: x @ w @ w.T, out_shardings=rows, compiler_options=xla.compiler_options(mesh))
    assert "all-gather" in step.lower(x, w).compile().as_text()


def test_options_of_the_compiler_can_be_changed_and_mistakes_are_named():
    one, two = (jax.make_mesh((n,), ("data",), devices=jax.devices()[:n]) for n in (1, 2))
    always = dict(xla_disable_hlo_passes="cse_barrier_expander", xla_cpu_prefer_vector_width=512)  # on a CPU
    assert xla.compiler_options(one) == xla.compiler_options(two) == always
    more = "xla_cpu_enable_fast_math=false, xla_backend_optimization_level=1"
    asked = dict(xla_cpu_enable_fast_math=False, xla_backend_optimization_level=1)
    assert xla.compiler_options(one, more) == always | asked
    lowered = jax.jit(lambda x: x, compiler_options=xla.compiler_options(one, "xla_foo=1")).lower(1.0)
    with pytest.raises(UserError, match=r"^config.training.xla=xla_foo=1: No such compile option: 'xla_foo'"):
        xla.compile_step(lowered, "xla_foo=1")
    with pytest.raises(UserError, match=r"config.training.xla='fast': must be NAME=VALUE"):
        configs.mamba(**{"training.xla": "fast"})
