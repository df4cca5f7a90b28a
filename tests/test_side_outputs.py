"""What branches report beside their output: through every kind of stack, micro-batches, meshes, up to the metrics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from seqmodels.branch import Branch
from seqmodels.branches import BRANCHES
from seqmodels.configs.base import base
from seqmodels.heads.next_token import next_token_loss
from seqmodels.interop.stacking import stack
from seqmodels.layers.parameter import normal
from seqmodels.model import build
from seqmodels.training import loop, metrics, sharding, side
from seqmodels.training.optimizer import make_optimizer, make_schedule
from seqmodels.training.state import abstract_params, abstract_state, init_state
from seqmodels.training.step import lower_train_step, make_train_step
from tests.array_data import ArrayDataset, which_token
from tests.overrides import with_fields
from tests.training_model import random_batch

VOCABULARY = 16
# layers, and places where several branches of a block report; and the branch
REPORTERS = {"0": "mixer", "1.mixer": "mixer", "1.mlp": "mlp", "2": "mixer", "3.mixer": "mixer", "3.mlp": "mlp"}


class Toy(Branch):
    """A matrix, whose output should be small (a loss), and has a mean (a figure)."""

    @nn.compact
    def __call__(self, x, seq, state=None):
        y = x @ self.matrix("kernel", (self.width, self.width), ("embed", None), normal(0.3))
        self.sow("losses", "size", 0.1 * jnp.square(y).mean())
        self.sow("figures", "mean", y.mean())
        return y, {}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(BRANCHES, "toy", Toy)


def settings(**overrides):
    """Two groups of two blocks, of which the second reports twice: layers 0, 1, 2 and 3."""
    config = base().unlock()
    config.model.toy = ConfigDict()
    config.model.pattern, config.model.repeats, config.model.width = "toy toy+toy", 2, 8
    config.batch_size, config.seq_len, config.mesh.data, config.steps = 8, 6, 1, 4
    return with_fields(config, overrides)


def uneven(config):
    """A batch in which rows have different numbers of targets."""
    batch = random_batch(0, config, VOCABULARY)
    batch["targets"] = np.where(np.arange(6) < np.arange(1, 9)[:, None], batch["targets"], -1)
    return batch


def one_step(config, batch):
    """Metrics of a step from the same parameters, whatever the stack, and the parameters after it, unrolled."""
    model, mesh, params = build(config.model, VOCABULARY), sharding.make_mesh(config), plain_parameters()
    optimizer = make_optimizer(config.optimizer, abstract_params(model, config))
    abstract = abstract_state(model, optimizer, config, mesh)
    train_step = make_train_step(model, optimizer, make_schedule(config.optimizer, config.steps), config)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        compiled = lower_train_step(train_step, abstract, config, mesh).compile()
        state = init_state(model, optimizer, config, abstract)
        if config.model.scan_blocks:
            params = stack(params, 2 * config.model.scan_blocks)
        params = jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), params, state.params)
        _, values = compiled(state.replace(params=params), sharding.put_batch(batch, mesh))
    return {name: float(value) for name, value in values.items()}


@functools.cache
def plain_parameters():
    """Of the unrolled model, with a seed of their own."""
    model = build(settings().model, VOCABULARY)
    boxed = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 6), jnp.int32))["params"]
    return jax.tree.map(np.array, sharding.unbox(boxed))  # copies, as steps consume what they are given


def expected(batch):
    """Loss, what is reported by layer, and the norm of the gradient, of one batch as a whole, by hand."""
    model = build(settings().model, VOCABULARY)

    def objective(params):
        (hidden, _), reported = model.apply(
            {"params": params}, batch["tokens"], segment_ids=batch["segment_ids"], mutable=("losses", "figures")
        )
        nats, sums = next_token_loss(lambda h: h @ params["embedding"].T, hidden, batch["targets"])
        losses = {at: reported["losses"][f"block_{at[0]}"][branch]["size"][0] for at, branch in REPORTERS.items()}
        figures = {at: reported["figures"][f"block_{at[0]}"][branch]["mean"][0] for at, branch in REPORTERS.items()}
        return nats / sums.count + sum(losses.values()), (nats / sums.count, sums.count, losses, figures)

    gradients, (loss, count, losses, figures) = jax.jit(jax.grad(objective, has_aux=True))(plain_parameters())
    values = {"loss": loss, "size": sum(losses.values())}
    values |= {f"size/{at}": value for at, value in losses.items()}
    values |= {f"mean/{at}": value for at, value in figures.items()}
    return {name: float(value) for name, value in values.items()}, float(count), gradients


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(dict(model__scan_blocks=1), marks=pytest.mark.slow),
        pytest.param(dict(model__remat="block"), marks=pytest.mark.slow),
        pytest.param(dict(model__scan_blocks=1, model__remat="block"), marks=pytest.mark.slow),
        dict(mesh__data=2, mesh__expert=2, model__scan_blocks=2),
    ],
    ids=["unrolled", "scanned", "remat", "scanned remat", "mesh"],
)
def test_a_loss_and_a_figure_by_layer(overrides):
    config = settings(**overrides)
    batch = uneven(config)
    values, _, gradients = expected(batch)
    found = one_step(config, batch)
    for name, value in values.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    assert found["grad_norm"] == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-5)
    assert len({found[f"size/{at}"] for at in REPORTERS}) == 6  # or layers could be taken for one another


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [pytest.param({}, marks=pytest.mark.slow), dict(model__scan_blocks=1, model__remat="block", mesh__fsdp=2)],
)
def test_micro_batches_are_averaged_by_their_tokens(overrides):
    """Of which they have different numbers: micro-batch i has the rows i, i + 2, ..."""
    config = settings(training__accumulate=2, **overrides)
    batch = uneven(config)
    parts = [expected({name: rows[i::2] for name, rows in batch.items()}) for i in range(2)]
    total = sum(count for _, count, _ in parts)
    assert parts[0][1] != parts[1][1]
    found = one_step(config, batch)
    for name in parts[0][0]:
        mean = sum(values[name] * count for values, count, _ in parts) / total
        assert found[name] == pytest.approx(mean, rel=1e-5, abs=1e-7), name
    summed = jax.tree.map(
        lambda *gradients: sum(g * count for g, (_, count, _) in zip(gradients, parts, strict=True)) / total,
        *(gradients for *_, gradients in parts),
    )
    assert found["grad_norm"] == pytest.approx(float(optax.tree.norm(summed)), rel=1e-5)


def test_a_run_writes_them(tmp_path):
    """To metrics.jsonl and to TensorBoard."""
    config = settings(model__head="classify", model__pattern="toy mlp toy", model__repeats=1, steps=2, seq_len=12)
    config.model.mlp = ConfigDict()
    data = ArrayDataset("classify", which_token, 8, {"tokens": 3, "labels": 2}, rows=8)
    loop.train(config, tmp_path / "run", data)
    rows = [row for row in metrics.read(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert list(rows[0])[:2] == ["step", "loss"]
    for row in rows:
        assert {name for name in row if name.startswith(("size", "mean"))} == {
            "size", "size/0", "size/2", "mean/0", "mean/2",
        }  # fmt: skip
        assert row["size"] == pytest.approx(row["size/0"] + row["size/2"])
    (events,) = (tmp_path / "run").glob("events.*")
    assert b"size/2" in events.read_bytes()


def test_what_cannot_be_a_metric():
    model = settings().model
    with pytest.raises(ValueError, match=r"'load' of shape \(3,\); it must be a scalar"):
        side.collect({"figures": {"block_0": {"mixer": {"load": (jnp.zeros(3),)}}}}, model)
    with pytest.raises(ValueError, match="'loss', which is the name of another metric"):
        side.join({"loss": jnp.zeros(())}, {"loss": jnp.zeros(())})
