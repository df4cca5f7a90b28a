"""One optimizer step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqmodels.training import sharding
from seqmodels.training.loss import LossSums, next_token_loss
from seqmodels.training.optimizer import global_norm
from seqmodels.training.state import TrainState

# As calls of cuBLAS products add to what is there already: a gradient's second part to the first. As Triton fusions
# they leave that sum to a kernel of its own. (benchmarks/notes/model_step.md)
COMPILER_OPTIONS = {platform: {"xla_gpu_enable_triton_gemm": False} for platform in ("cuda", "gpu")}


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    config: ConfigDict,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """The pure function (state, batch) -> (state, metrics) of one step.

    batch: {"tokens", "targets", "segment_ids"}, [B, T] int32; targets of -1 do not count. metrics: float32 scalars.

    A step whose loss or gradient is not finite changes neither parameters, optimizer, average nor carry. Under
    `training.nan="skip"` it counts as a step, and the next one goes on. Under "stop" the state stays at the last good
    step from then on, whatever else was dispatched before the host saw the metric.
    """
    z_weight, accumulate = config.training.z_loss, config.training.accumulate

    def loss_sums(params, rows, carry, rngs):
        hidden, new_carry = model.apply(
            {"params": params},
            rows["tokens"],
            segment_ids=rows["segment_ids"] if config.data.reset else None,
            state=carry,
            deterministic=config.model.dropout == 0,
            rngs=rngs,
        )
        # The sum is differentiated and divided by the count at the end: the mean over the batch, however it is cut.
        loss, sums = next_token_loss(
            lambda h: model.apply({"params": params}, h, method="logits"),
            hidden,
            rows["targets"],
            chunk=config.training.loss_chunk,
            z_weight=z_weight,
        )
        return loss, (sums, new_carry)

    gradients = jax.grad(loss_sums, has_aux=True)

    def batch_gradients(params, batch, carry, rngs):
        """Sums over the batch of the loss and of its gradients, micro-batch by micro-batch."""
        if accumulate == 1:
            grads, (sums, carry) = gradients(params, batch, carry, rngs)
            return grads, sums, carry

        def body(total, piece):
            index, rows, rows_carry = piece
            grads, (sums, new_carry) = gradients(
                params, rows, rows_carry, dict(rngs, dropout=jax.random.fold_in(rngs["dropout"], index))
            )
            return jax.tree.map(jnp.add, total, (grads, sums)), new_carry

        zero = (jax.tree.map(jnp.zeros_like, params), LossSums(*(jnp.zeros((), jnp.float32),) * 3))
        pieces = (jnp.arange(accumulate), split_rows(batch, accumulate), split_rows(carry, accumulate))
        (grads, sums), new_carry = jax.lax.scan(body, zero, pieces)
        return grads, sums, join_rows(new_carry)

    def train_step(state, batch):
        rngs = random_streams(config, state.step)
        grads, sums, carry = batch_gradients(state.params, batch, state.carry, rngs)
        grads = jax.tree.map(lambda g: g / sums.count, grads)
        loss, grad_norm = sums.nats / sums.count, global_norm(grads)

        rate = schedule(state.step)
        direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)
        ema = state.ema
        if ema is not None:
            decay = config.optimizer.ema
            ema = jax.tree.map(lambda average, p: decay * average + (1 - decay) * p, ema, params)
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

        metrics = {
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "skipped": new.skipped.astype(jnp.float32),
        }
        if config.metrics.norms:
            metrics |= {"param_norm": global_norm(params), "update_norm": rate * global_norm(direction)}
        if z_weight:
            metrics["z_loss"] = z_weight * sums.z_squared / sums.count
        return new, metrics

    return train_step


def random_streams(config: ConfigDict, step: jax.Array | int) -> dict[str, jax.Array]:
    """Keys of what is random at a step: dropout, and features that Performer draws every `redraw` steps."""
    key = jax.random.key(config.seed)
    redraw = config.model.get("performer", {}).get("redraw", 0)
    features = {"features": jax.random.fold_in(jax.random.fold_in(key, 1), step // redraw)} if redraw else {}
    return {"dropout": jax.random.fold_in(key, step), **features}


def lower_train_step(train_step, abstract: TrainState, config: ConfigDict, mesh: Mesh) -> jax.stages.Lowered:
    """`train_step` traced for the mesh. The state is donated, and keeps its shardings, so it compiles only once."""
    tokens = jax.ShapeDtypeStruct(
        (config.batch_size, config.seq_len), jnp.int32, sharding=sharding.tokens_sharding(mesh)
    )
    batch = {name: tokens for name in ("tokens", "targets", "segment_ids")}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    step = jax.jit(
        train_step,
        in_shardings=(shardings, {name: tokens.sharding for name in batch}),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
        compiler_options=COMPILER_OPTIONS.get(mesh.devices.flat[0].platform),
    )
    return step.lower(abstract, batch)


def split_rows(tree, pieces: int):
    """[B, ...] -> [pieces, B / pieces, ...]. Piece i takes every pieces-th row, so that no row changes its device."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1), tree)


def join_rows(tree):
    """The inverse of split_rows."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree)
