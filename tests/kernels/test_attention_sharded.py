"""Attention with time split over devices against attention on one device."""

import functools
import re
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from seqmodels import parallel
from seqmodels.kernels.attention import attention, xla
from seqmodels.kernels.attention.biases import Alibi
from seqmodels.kernels.attention.masks import Strided
from seqmodels.kernels.dispatch import UnsupportedError
from tests.kernels.helpers import assert_close

B, T, H, D, DEVICES = 2, 24, 4, 4, 4
pytestmark = pytest.mark.skipif(jax.device_count() < DEVICES, reason=f"needs {DEVICES} devices")

SEGMENTS = np.array([[0] * 3 + [1] * 10 + [2] * 11, [0] * 20 + [3] * 4], np.int32)
POSITIONS = np.array([[*range(3), *range(10), *range(11)], [*range(20), *range(4)]], np.int32)
draw = np.random.default_rng(3)
CASES = {
    "causal": {},
    "full, some keys": dict(causal=False, key_mask=draw.random((B, T)) < 0.7),
    "window": dict(window=5),
    "documents": dict(segment_ids=SEGMENTS),
    "sinks of documents": dict(segment_ids=SEGMENTS, positions=POSITIONS, window=3, sinks=2),
    "any order": dict(positions=draw.permuted(np.tile(np.arange(T), (B, 1)), axis=1).astype(np.int32), window=9),
    "scores": dict(
        bias=Alibi(),
        bias_weights=draw.uniform(0.2, 1, (H, 1)).astype(np.float32),
        gates=np.cumsum(draw.normal(-0.5, 0.3, (B, T, H)), axis=1).astype(np.float32),
        softcap=2.0,
    ),
    "pattern": dict(pattern=Strided(3, block=2)),
}


def inputs(kv_heads, length=T):
    draw = np.random.default_rng(0)
    shapes = dict(q=H, k=kv_heads, v=kv_heads)
    return {name: draw.normal(size=(B, length, n, D)).astype(np.float32) for name, n in shapes.items()}


def with_gradients(function, options):
    """The gradients of a function of its arguments, and its output: compiled once for several calls."""

    def run(args):
        o = function(**options | args)
        return jnp.sum(jnp.sin(o)), o

    return jax.jit(jax.grad(run, has_aux=True))


def value_and_gradients(function, args, options):
    arrays = {k: x for k, x in options.items() if isinstance(x, np.ndarray) and x.dtype == np.float32}
    return with_gradients(function, options)(args | arrays)


def on_devices():
    """A mesh with time split over 4 devices, and its rules."""
    mesh = jax.make_mesh((DEVICES,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])
    return jax.set_mesh(mesh), nn.logical_axis_rules((("length", "sequence"),))


@pytest.mark.parametrize("kv_heads", [2, 4], ids=["ring", "all to all"])
@pytest.mark.parametrize("case", CASES)
def test_equals_one_device(case, kv_heads):
    args, options = inputs(kv_heads), dict(CASES[case], implementation="xla")
    want = value_and_gradients(attention, args, options)
    mesh, rules = on_devices()
    with mesh, rules:
        got = value_and_gradients(parallel.attention, args, options)
    assert_close(got, want, 2e-6)


def test_devices_of_a_causal_ring_have_the_same_work(monkeypatch):
    """Each device visits as many tiles of each piece as the others of the pieces that they have at that time."""
    monkeypatch.setitem(xla.TILE, jax.default_backend(), 2)
    visits, original = [], xla._sums

    def counted(options, inputs, queries, keys):
        place = jax.lax.axis_index("sequence"), keys.side.position[0, 0]
        jax.debug.callback(lambda device, key: visits.append((int(device), int(key))), *place)
        return original(options, inputs, queries, keys)

    monkeypatch.setattr(xla, "_sums", counted)
    mesh, rules = on_devices()
    with mesh, rules:
        run = jax.jit(functools.partial(parallel.attention, implementation="xla"))
        jax.block_until_ready(run(**inputs(1, 8 * DEVICES)))
    jax.effects_barrier()
    half = 4  # tokens; the piece of device n has the halves n and 7 - n
    steps = Counter((device, (device - min(key // half, 7 - key // half)) % DEVICES) for device, key in visits)
    each = {step: {steps[device, step] for device in range(DEVICES)} for step in range(DEVICES)}
    assert each == {0: {10}, 1: {8}, 2: {8}, 3: {8}}  # at first, each half sees itself in part


def test_tiles_of_pieces(monkeypatch):
    """Each piece of several tiles."""
    monkeypatch.setitem(xla.TILE, jax.default_backend(), 4)
    args, options = inputs(2), dict(CASES["sinks of documents"], implementation="xla")
    want = value_and_gradients(attention, args, dict(options, implementation="reference"))
    mesh, rules = on_devices()
    with mesh, rules:
        assert_close(value_and_gradients(parallel.attention, args, options), want, 5e-6)


@pytest.mark.parametrize("kv_heads", [2, 4], ids=["ring", "all to all"])
def test_what_is_not_finite_stays_in_its_document(kv_heads):
    options = dict(CASES["documents"], implementation="xla")
    args, bad = inputs(kv_heads), (SEGMENTS == 1)[..., None, None]
    spoilt = {name: np.where(bad, np.nan, x).astype(np.float32) for name, x in args.items()}
    mesh, rules = on_devices()
    with mesh, rules:
        run = with_gradients(parallel.attention, options)
        (gradients, o), (got, got_o) = run(args), run(spoilt)
    good = ~bad[..., 0, 0]
    assert_close(got_o[good], o[good], 1e-6)
    assert_close({k: x[good] for k, x in got.items()}, {k: x[good] for k, x in gradients.items()}, 1e-6)
    assert np.isnan(got_o[~good]).all()


@pytest.mark.parametrize("kv_heads, sent", [(2, "collective-permute"), (4, "all-to-all")], ids=["ring", "all to all"])
def test_time_is_never_gathered(kv_heads, sent):
    """Forward and backward: numbers go to the next device, or are exchanged for heads."""
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in inputs(kv_heads).items()}
    spec = jax.sharding.PartitionSpec(None, "sequence")
    mesh, rules = on_devices()
    with mesh, rules:
        here = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), spec)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
        run = functools.partial(value_and_gradients, parallel.attention, options=dict(segment_ids=SEGMENTS))
        text = jax.jit(run).lower(shapes).compile().as_text()
    assert f" {sent}" in text
    assert not re.findall(r"f32\[[\d,]*\](?:\{[\d,]*\})? all-gather", text)


def test_other_implementations_in_a_ring_are_refused():
    mesh, rules = on_devices()
    message = "'reference' cannot serve: 2 heads of keys do not divide over 4 devices of time"
    with mesh, rules, pytest.raises(UnsupportedError, match=message):
        jax.eval_shape(functools.partial(parallel.attention, implementation="reference"), **inputs(2))
