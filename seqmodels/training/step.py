"""One optimizer step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqmodels.backbone import draws_by_row, redraw_every
from seqmodels.data.contract import Spec, text_spec
from seqmodels.model import head_of, input_of
from seqmodels.parallel import mean_over_rows
from seqmodels.training import sharding, side
from seqmodels.training.micro_batches import batch_gradients
from seqmodels.training.optimizer import averaged_params, global_norm, rate_factors, sign_rule
from seqmodels.training.state import TrainState, abstract_params
from seqmodels.training.xla import compiler_options


def make_loss(model: nn.Module, config: ConfigDict) -> Callable[..., tuple[jax.Array, tuple]]:
    """The pure function (params, rows, carry, rngs, running) that a step differentiates.

    It returns (total, ((sums, reports), carry, running)).
    rows: arrays as `dataset.spec` says, [B, ...]. total: float32, the sum over what counts in the rows, not the mean.
    running: what the step's micro-batches before this one left (see `seqmodels.training.side`); None: there are none.
    """
    head, key = head_of(config.model), input_of(config.model).key
    options = head.options(config.training)

    def loss_sums(params, rows, carry, rngs, running=None):
        micro = {} if running is None else {side.RUNNING: running}
        (hidden, new_carry), reported = model.apply(
            {"params": params, **micro},
            rows[key],
            segment_ids=rows.get("segment_ids") if config.data.reset else None,
            mask=rows.get("mask"),
            state=carry,
            deterministic=config.model.dropout == 0,
            rngs=rngs,
            **{name: rows[name] for name in ("steps", "observed") if name in rows},
            mutable=(*side.COLLECTIONS, *micro),
        )

        # The sum is differentiated and divided by the count at the end: the mean over the batch, however it is cut.
        def outputs_of(*arguments, method=head.method):
            return model.apply({"params": params}, *arguments, method=method)

        total, sums = head.loss(outputs_of, hidden, rows, **options)
        reports = side.weighted(side.collect(reported, config.model), mean_over_rows(sums.count))
        for loss in reports.losses.values():
            total += loss
        return total, ((sums, reports), new_carry, reported.get(side.RUNNING, {}))

    return loss_sums


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    config: ConfigDict,
    boxed: Any = None,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """The pure function (state, batch) -> (state, metrics) of one step.

    Args:
        boxed: the abstract parameters with their declarations; None: they are traced here.

    batch: arrays as `dataset.spec` says (see `seqmodels.data.contract`). metrics: float32 scalars, "loss" among them,
    and what branches report (see `seqmodels.training.side`).

    A step whose loss or gradient is not finite changes neither parameters, optimizer state, average nor carry. With
    `training.nan="skip"` it counts as a step, and training continues. With "stop" the state stays at the last good
    step, also in steps that were dispatched before the host saw the metric.
    """
    accumulate, head = config.training.accumulate, head_of(config.model)
    options, groups = head.options(config.training), config.optimizer.groups
    boxed = abstract_params(model, config) if boxed is None else boxed
    factors, split_signs = rate_factors(groups, boxed) if groups else None, sign_rule(boxed)
    loss_sums = make_loss(model, config)
    gradients_of = batch_gradients(loss_sums, accumulate, boxed, together=draws_by_row(config.model))

    def train_step(state, batch):
        rngs = random_streams(config, state.step)
        grads, (sums, reports), carry = gradients_of(state.params, batch, state.carry, rngs)
        grads = jax.tree.map(lambda g: g / sums.count, grads)
        grads, moves = split_signs(grads) if split_signs else (grads, None)
        figures = head.figures(sums, **options)
        loss, grad_norm = figures["loss"], global_norm(grads)

        rate = schedule(state.step)
        direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
        if factors is not None:
            direction = jax.tree.map(jnp.multiply, factors, direction)
        params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)
        if moves is not None:
            params = jax.tree.map(jnp.subtract, params, moves)
        ema = state.ema
        if ema is not None:
            ema = averaged_params(config.optimizer, ema, params, opt_state)
        carry = jax.lax.stop_gradient(carry) if config.training.bptt else None

        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = TrainState(state.step + 1, state.skipped, params, opt_state, ema, carry)
        good = finite
        if config.training.nan == "stop":
            good &= state.skipped == 0
            kept = state.replace(skipped=state.skipped + ~finite)
        else:
            kept = state.replace(step=state.step + 1, skipped=state.skipped + 1)
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, kept)

        metrics = figures | {
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "skipped": new.skipped.astype(jnp.float32),
        }
        if config.metrics.norms:
            metrics |= {"param_norm": global_norm(params), "update_norm": rate * global_norm(direction)}
        return new, side.join(metrics, side.metrics(reports, sums.count))

    return train_step


def random_streams(config: ConfigDict, step: jax.Array | int) -> dict[str, jax.Array]:
    """The random keys of a step: for dropout, and for features that a branch draws again every so many steps."""
    key = jax.random.key(config.seed)
    redraw = redraw_every(config.model)
    features = {"features": jax.random.fold_in(jax.random.fold_in(key, 1), step // redraw)} if redraw else {}
    return {"dropout": jax.random.fold_in(key, step), **features}


def lower_train_step(
    train_step: Callable, abstract: TrainState, config: ConfigDict, mesh: Mesh, spec: Spec | None = None
) -> jax.stages.Lowered:
    """`train_step`, traced for the mesh. The state is donated. It keeps its shardings, so one program serves all steps.

    Args:
        spec: the dataset's; None: of text.
    """
    spec = text_spec(config.batch_size, config.seq_len, 0) if spec is None else spec
    batch = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding.batch_sharding(mesh, array.shape))
        for name, array in spec.items()
    }
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    step = jax.jit(
        train_step,
        in_shardings=(shardings, jax.tree.map(lambda array: array.sharding, batch)),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
        compiler_options=compiler_options(mesh, config.training.xla) or None,
    )
    return step.lower(abstract, batch)
