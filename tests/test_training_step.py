"""One step: chunked loss, accumulation, truncated BPTT, meshes, averages, and what is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.configs import transformer
from seqmodels.errors import UserError
from seqmodels.heads.next_token import log_sum_exp, next_token_loss
from seqmodels.model import build
from seqmodels.training import sharding
from seqmodels.training.micro_batches import join_rows, split_rows
from seqmodels.training.optimizer import make_optimizer, make_schedule
from seqmodels.training.state import abstract_params, abstract_state, init_state
from seqmodels.training.step import lower_train_step, make_train_step
from tests.kernels.helpers import needs_cuda_plugin
from tests.training_model import LeakyModel, random_batch, small_config


def trainer(config, model=None):
    """(state, step) where step(state, batch) is compiled on the config's mesh."""
    model = model or LeakyModel()
    mesh = sharding.make_mesh(config)
    optimizer = make_optimizer(config.optimizer, abstract_params(model, config))
    abstract = abstract_state(model, optimizer, config, mesh)
    train_step = make_train_step(model, optimizer, make_schedule(config.optimizer, config.steps), config)
    compiled = lower_train_step(train_step, abstract, config, mesh).compile()
    state = init_state(model, optimizer, config, abstract)
    return state, lambda state, batch: compiled(state, sharding.put_batch(batch, mesh))


def run(config, model=None, steps=None, batch=random_batch):
    state, step = trainer(config, model)
    losses = []
    for n in range(steps or config.steps):
        state, metrics = step(state, batch(n, config))
        losses.append(float(metrics["loss"]))
    return state, losses


def assert_close(a, b, tolerance=2e-6):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def test_norms_are_metrics_that_can_be_left_out():
    """Of parameters after the step and of what was added to them."""
    config = small_config()
    state, step = trainer(config)
    before = jax.tree.map(np.asarray, state.params)
    new, metrics = step(state, random_batch(0, config))

    def norm(tree):
        return np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree)))

    assert float(metrics["param_norm"]) == pytest.approx(norm(new.params), rel=1e-5)
    added = jax.tree.map(lambda a, b: np.asarray(a) - b, new.params, before)
    assert float(metrics["update_norm"]) == pytest.approx(norm(added), rel=1e-3)
    config.metrics.norms = False
    _, without = trainer(config)[1](trainer(config)[0], random_batch(0, config))
    assert set(metrics) - set(without) == {"param_norm", "update_norm"}


@pytest.mark.parametrize("chunk", [1, 4, 5, 12, 0])
def test_chunked_loss_is_the_plain_loss(chunk):
    """Value and gradients against float64 log-softmax written out, with weights, at lengths that do not divide."""
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(2, 12, 6)), rng.normal(size=(6, 9))
    targets, weights = rng.integers(0, 9, (2, 12)), rng.integers(0, 2, (2, 12)).astype(float)

    def loss(h, t):
        return next_token_loss(lambda x: x @ t, h, jnp.asarray(targets), jnp.asarray(weights), chunk, z_weight=0.1)

    (_, sums), (dh, dt) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        jnp.asarray(hidden, jnp.float32), jnp.asarray(table, jnp.float32)
    )
    logits = hidden @ table
    log_z = np.log(np.exp(logits).sum(-1))
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    assert float(sums.nats) == pytest.approx(((log_z - chosen) * weights).sum(), rel=1e-5)
    assert float(sums.z_squared) == pytest.approx((log_z**2 * weights).sum(), rel=1e-5)
    assert float(sums.count) == weights.sum()
    softmax = np.exp(logits - log_z[..., None])
    dlogits = (softmax * (1 + 0.2 * log_z[..., None]) - np.eye(9)[targets]) * weights[..., None]
    np.testing.assert_allclose(dh, dlogits @ table.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dt, np.einsum("btd,btv->dv", hidden, dlogits), rtol=1e-4, atol=1e-5)


def test_log_sum_exp_in_one_pass(monkeypatch):
    """What accelerators run, at extremes too."""
    x = np.random.default_rng(0).normal(size=(3, 4, 33)).astype(np.float32) * 30
    x[0, 0, 5:], x[0, 1, 3], x[0, 2, 0] = -np.inf, 1e4, -1e30
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda x, cpu, default: default(x))
    wide = x.astype(np.float64)
    want = np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1)) + wide.max(-1)
    np.testing.assert_allclose(log_sum_exp(jnp.asarray(x)), want, rtol=1e-6)
    assert np.isnan(log_sum_exp(jnp.array([0.0, np.nan, 1.0])))


def test_logits_of_a_row_never_exist_at_once():
    """Temporary memory of the gradient grows with the chunk, not with the row."""

    def temporary(chunk):
        hidden = jax.ShapeDtypeStruct((1, 2048, 8), jnp.float32)
        table = jax.ShapeDtypeStruct((8, 4096), jnp.float32)
        targets = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
        loss = lambda h, t, y: next_token_loss(lambda x: x @ t, h, y, chunk=chunk)[0]  # noqa: E731
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, table, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    row = 2048 * 4096 * 4  # bytes of the row's logits
    assert temporary(0) >= row
    assert temporary(64) < row / 8


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=needs_cuda_plugin)])
def test_a_windowed_step_needs_memory_linear_in_the_row(platform):
    """Of a whole step at T = 65,536, compiled for the CPU or an H200; booleans [T, T] alone would take 4 GiB."""
    devices = jax.devices("cpu")[:1]
    if platform == "cuda":
        from tests.kernels.compile_for_h100 import DEVICES as devices

    def temporary(length):
        config = transformer.get_config().unlock()
        config.update(batch_size=1, seq_len=length)
        config.model.update(width=64, repeats=2, dtype="bfloat16")
        config.model.attention.update(heads=1, kv_heads=1, window=512)
        config.model.mlp.hidden = 64
        model, mesh = build(config.model, 32), sharding.make_mesh(config, list(devices))
        optimizer = make_optimizer(config.optimizer, abstract_params(model, config))
        step = make_train_step(model, optimizer, make_schedule(config.optimizer, config.steps), config)
        abstract = abstract_state(model, optimizer, config, mesh)
        with jax.set_mesh(mesh):  # the implementations are those of its platform
            compiled = lower_train_step(step, abstract, config, mesh).compile()
        assert platform == "cpu" or "mosaic_gpu" in compiled.as_text()
        return compiled.memory_analysis().temp_size_in_bytes

    half, whole = temporary(2**15), temporary(2**16)
    assert 1.5 * half < whole < 2.05 * half
    assert whole < 2**16 * 64 * 4 * 64  # 64 arrays [T, D]


def test_split_and_join_rows_are_inverse():
    rows = {"a": np.arange(24).reshape(8, 3), "b": np.arange(8)}
    back = join_rows(split_rows(rows, 4))
    assert all((back[name] == rows[name]).all() for name in rows)


def test_accumulation_is_the_full_batch():
    """With a carry; without one see tests/test_collectives.py, on several devices."""
    options = dict(training__bptt=True, training__z_loss=1e-3)
    whole, losses = run(small_config(**options))
    parts, losses_of_parts = run(small_config(**options, training__accumulate=4))
    np.testing.assert_allclose(losses, losses_of_parts, rtol=1e-6)
    assert_close(whole.params, parts.params, 1e-5)
    assert_close(whole.carry, parts.carry, 1e-5)


def test_bptt_carries_the_state_and_cuts_the_gradient():
    """Rows of 12 with the state handed on give the loss of rows of 24; their gradient is that of the second half."""
    model, config = LeakyModel(), small_config(training__bptt=True, optimizer__learning_rate=0.0)
    rng = np.random.default_rng(1)
    text = rng.integers(0, 32, (8, 25)).astype(np.int32)
    segments = np.repeat([[3] * 5 + [4] * 19], 8, axis=0).astype(np.int32)

    def half(n, _):
        piece = slice(12 * n, 12 * n + 12)
        targets = text[:, 12 * n + 1 : 12 * n + 13]
        return {"tokens": text[:, piece], "targets": targets, "segment_ids": segments[:, piece]}

    state, losses = run(config, model, steps=2, batch=half)
    hidden, last = model.apply({"params": state.params}, text[:, :24], segment_ids=segments)
    nats = [
        float(next_token_loss(lambda h: h @ state.params["table"].T, hidden[:, s], text[:, 1:][:, s])[0]) / 96
        for s in (slice(0, 12), slice(12, 24))
    ]
    np.testing.assert_allclose(losses, nats, rtol=1e-5)
    assert_close(state.carry, last)


def test_without_bptt_no_carry_is_kept():
    assert run(small_config(), steps=1)[0].carry is None


@pytest.mark.parametrize(
    "mesh",
    [
        *[
            pytest.param(mesh, marks=pytest.mark.slow)
            for mesh in (dict(data=8), dict(fsdp=8, data=1), dict(data=2, tensor=4))
        ],
        dict(data=2, fsdp=2, tensor=2),
        dict(data=2, sequence=4),
        pytest.param(dict(data=2, expert=4), marks=pytest.mark.slow),
    ],
)
def test_eight_devices_train_as_one(mesh):
    alone, losses = run(small_config(training__loss_chunk=4))
    many, losses_of_many = run(
        small_config(training__loss_chunk=4, **{f"mesh__{axis}": size for axis, size in mesh.items()})
    )
    np.testing.assert_allclose(losses, losses_of_many, rtol=1e-5)
    assert_close(alone.params, many.params, 1e-4)
    sizes = {leaf.sharding.num_devices for leaf in jax.tree.leaves(many)}
    assert sizes == {8}
    if mesh.get("fsdp", 1) * mesh.get("tensor", 1) > 1:
        shard = many.params["kernel"].addressable_shards[0].data
        assert shard.size * mesh.get("fsdp", 1) * mesh.get("tensor", 1) == many.params["kernel"].size


def test_every_device_has_rows_of_its_own():
    """Along data, fsdp and expert: no two devices repeat each other's work."""
    mesh = sharding.make_mesh(small_config(mesh__data=2, mesh__fsdp=2, mesh__expert=2))
    batch = {"tokens": np.zeros((8, 12), np.int32), "labels": np.arange(8), "values": np.zeros((8, 12, 3))}
    for name, array in sharding.put_batch(batch, mesh).items():
        places = sorted((shard.index[0].start, shard.index[0].stop) for shard in array.addressable_shards)
        assert places == [(n, n + 1) for n in range(8)], name
    assert sharding.local_rows(mesh, 8) is None  # one process takes the whole batch
    with pytest.raises(UserError, match=r"gave 3 rows; must give those of slice\(4, 8"):
        sharding.put_batch({"labels": np.arange(3)}, mesh, slice(4, 8), 8)


@pytest.mark.slow
def test_fresh_state_is_the_same_on_every_mesh():
    one, _ = trainer(small_config())
    many, _ = trainer(small_config(mesh__data=2, mesh__fsdp=2, mesh__tensor=2))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(x, y)


def test_ema_follows_the_parameters():
    config = small_config(optimizer__ema=0.75)
    state, step = trainer(config)
    average = jax.tree.map(np.asarray, state.params)
    for n in range(3):
        state, _ = step(state, random_batch(n, config))
        average = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * np.asarray(p), average, state.params)
    assert_close(state.ema, average)


def test_dropout_depends_on_seed_and_step_alone():
    model = LeakyModel(dropout=0.5)
    config = small_config(model__dropout=0.5, optimizer__learning_rate=0.0)
    same = lambda n, config: random_batch(0, config)  # noqa: E731
    _, losses = run(config, model, batch=same)
    assert len(set(losses)) == len(losses)  # another mask each step
    assert run(config, model, batch=same)[1] == losses
    assert run(small_config(model__dropout=0.5, optimizer__learning_rate=0.0, seed=1), model, batch=same)[1] != losses


class Burning(LeakyModel):
    """NaN wherever token 31 is read."""

    def __call__(self, tokens, **kwargs):
        hidden, state = super().__call__(tokens, **kwargs)
        return jnp.where((tokens == 31)[..., None], jnp.nan, hidden), state


def burning_batch(step, config, bad=(2,)):
    batch = random_batch(step, config, vocab_size=31)
    if step in bad:
        batch["tokens"][0, 3] = 31
    return batch


def test_nan_skip_leaves_out_one_update():
    config = small_config(training__nan="skip", training__bptt=True)
    state, step = trainer(config, Burning())
    for n in range(5):
        before = jax.tree.map(np.array, state)
        state, metrics = step(state, burning_batch(n, config))
        assert int(state.step) == n + 1 and int(metrics["skipped"]) == int(n >= 2)
        changed = any(
            (np.asarray(x) != y).any()
            for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(before.params), strict=True)
        )
        assert changed == (n != 2) == bool(np.isfinite(metrics["loss"]))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
        if n == 2:
            assert_close(state.opt_state, before.opt_state, 0)
            assert_close(state.carry, before.carry, 0)


def test_nan_stop_freezes_the_last_good_state():
    """Also against the steps that were dispatched before the host saw the metric."""
    config = small_config(training__nan="stop")
    state, step = trainer(config, Burning())
    for n in range(5):
        state, _ = step(state, burning_batch(n, config))
        if n == 1:
            good = jax.tree.map(np.array, state)
    assert int(state.step) == 2 and int(state.skipped) > 0
    for x, y in zip(jax.tree.leaves(state.replace(skipped=0)), jax.tree.leaves(good.replace(skipped=0)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_training_learns():
    config = small_config(steps=60)
    _, losses = run(config, batch=lambda n, config: random_batch(n % 2, config))
    assert losses[-1] < 0.6 * losses[0]


def test_step_compiles_once():
    config = small_config()
    state, _ = trainer(config)
    abstract = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)
    after, _ = run(config, steps=2)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), after) == abstract


@pytest.mark.parametrize(
    "overrides, words",
    [
        (dict(mesh__data=16), "mesh asks for 16 devices .* there are 8"),
        (dict(mesh__data=2, mesh__tensor=8), "16 devices .*data=2, tensor=8"),
        (dict(mesh__data=-1, batch_size=12), "batch_size=12: must be a multiple of 8"),
        (dict(mesh__data=2, mesh__expert=3), "batch_size=8: must be a multiple of 6"),
        (dict(mesh__data=4, training__accumulate=4), "batch_size=8: must be a multiple of 16"),
        (dict(mesh__sequence=5), "seq_len=12: must be a multiple of mesh.sequence=5"),
    ],
)
def test_mesh_that_cannot_be(overrides, words):
    with pytest.raises(UserError, match=words):
        sharding.make_mesh(small_config(**overrides))


def test_mesh_takes_what_is_left():
    mesh = sharding.make_mesh(small_config(mesh__data=-1, mesh__tensor=2))
    assert mesh.shape == {"data": 4, "fsdp": 1, "tensor": 2, "sequence": 1, "expert": 1}


def test_axes_that_do_not_divide_stay_whole():
    mesh = sharding.make_mesh(small_config(mesh__fsdp=4, mesh__tensor=2))
    spec = lambda *axes, shape: tuple(sharding.spec_of(axes, shape, mesh))  # noqa: E731
    assert spec("embed", "inner", shape=(8, 6)) == ("fsdp", "tensor")
    assert spec("embed", "inner", shape=(6, 7)) == (None, None)
    assert spec("layers", "inner", "inner", shape=(4, 4, 4)) == (None, "tensor", None)
    assert spec("batch", None, shape=(8, 3)) == (("data", "expert", "fsdp"), None)
