"""How much of a lower layer a linear map finds again in a higher one: do hidden states degrade with depth?

For layers l and l - m the least-squares map, with a constant, from what the mixer of layer l reads (the normed input of
its block) to what the mixer of layer l - m read at the same token. It is fitted on one half of the rows, and its share
of explained variance R^2 is measured on the other, of the trained model and of one with fresh parameters.
"""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.errors import UserError
from seqmodels.evals.run import Run
from seqmodels.evals.scoring import rows_of
from seqmodels.training.sharding import unbox

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DISTANCES = (1, 2, 4, 8)  # m
ROWS = 64  # of a split that are read if there is no limit
RIDGE = 1e-6  # of the mean variance of the inputs: they may depend on each other


def check(config: Any) -> None:
    """Raises UserError for a model whose layers run in a scan, where their inputs cannot be looked at."""
    if scan := config.model.scan_blocks:
        raise UserError(f"config.model.scan_blocks={scan}: must be 0 for --evals=reconstruction")


@functools.partial(jax.jit, static_argnums=0)
def layer_inputs(model: Any, params: Any, tokens: jax.Array, segment_ids: jax.Array) -> list[jax.Array]:
    """What the mixer of each layer reads, from the bottom, each [B, T, D] float32."""
    first_norm = lambda module, method: module.name == "norm" and method == "__call__"  # noqa: E731
    _, captured = model.apply(
        {"params": params},
        tokens,
        segment_ids=segment_ids,
        capture_intermediates=first_norm,
        mutable=["intermediates"],
    )
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(captured["intermediates"]):
        names = [part.key for part in path if hasattr(part, "key")]
        block = next(name for name in names if name.startswith("block_"))
        found[int(block.removeprefix("block_"))] = leaf.astype(jnp.float32)
    return [found[layer] for layer in sorted(found)]


@jax.jit
def moments(inputs: list[jax.Array], mask: jax.Array) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    """Sums over real tokens of x x^T of each layer, with a last coordinate of one, and of x_l x_{l-m}^T."""
    ones = jnp.ones((*mask.shape, 1), jnp.float32)
    xs = [jnp.where(mask[..., None], jnp.concatenate([x, ones], axis=-1), 0).reshape(mask.size, -1) for x in inputs]
    product = functools.partial(jnp.matmul, precision="highest")
    pairs = [(l, m) for m in DISTANCES for l in range(m, len(xs))]
    return [product(x.T, x) for x in xs], {f"{l},{m}": product(xs[l].T, xs[l - m]) for l, m in pairs}


def explained(fit: tuple, test: tuple) -> dict[str, list[float]]:
    """R^2 by distance m, for each layer from m on, of float64 moments (own, crossed) of two halves of the rows."""
    result: dict[str, list[float]] = {}
    for pair, crossed in fit[1].items():
        layer, distance = map(int, pair.split(","))
        own = fit[0][layer]
        ridge = RIDGE * np.trace(own) / len(own) * np.eye(len(own))
        W = np.linalg.solve(own + ridge, crossed)
        target, across, inputs = test[0][layer - distance], test[1][pair], test[0][layer]
        # sum |y - W^T x|^2 and sum |y - mean|^2; the last coordinate of each vector is one
        error = np.trace(target) - 2 * np.sum(W * across) + np.sum(W * (inputs @ W))
        spread = np.trace(target) - target[-1] @ target[-1] / target[-1, -1]
        result.setdefault(str(distance), []).append(float(1 - error / spread))
    return result


def measure(model: Any, params: Any, batches: list[dict[str, np.ndarray]]) -> dict[str, list[float]]:
    """`explained` of a model on batches of rows, of which every second one is for the test."""
    halves: list[Any] = [None, None]
    for n, batch in enumerate(batches):
        inputs = layer_inputs(model, params, batch["tokens"], batch["segment_ids"])
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), moments(inputs, jnp.asarray(batch["mask"])))
        halves[n % 2] = sums if halves[n % 2] is None else jax.tree.map(np.add, halves[n % 2], sums)
    return explained(*halves)


def evaluate_run(run: Run, splits: list[str], limit: int | None) -> dict:
    """R^2 by split, of the trained model and of fresh parameters."""
    check(run.config)
    rows, result = max(2, min(run.batch_size, (limit or ROWS) // 2)), {}
    row = run.model.example_input(run.config.seq_len)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, run.params)
    fresh = jax.jit(lambda key: unbox(run.model.init(key, row)["params"]), out_shardings=shardings)
    untrained = fresh(jax.random.key(run.config.seed))
    for split in splits:
        batches = list(run.dataset[split].windows(run.config.seq_len, rows_of(rows, run.mesh), limit or ROWS))
        if len(batches) < 2:
            raise UserError(f"--evals=reconstruction: the {split} split has too few rows for two halves")
        result[split] = dict(
            trained=measure(run.model, run.params, batches), fresh=measure(run.model, untrained, batches)
        )
    return {"reconstruction": result}


def table(result: dict) -> str:
    lines = [f"{'R^2 of layer l - m in layer l':<32}{'m':>4}{'lowest l':>10}{'highest l':>11}{'mean':>8}"]
    for split, models in result["reconstruction"].items():
        for name, by_distance in models.items():
            for distance, values in by_distance.items():
                shown = f"{values[0]:>10.4f}{values[-1]:>11.4f}{np.mean(values):>8.4f}"
                lines.append(f"{split + ', ' + name:<32}{distance:>4}{shown}")
    return "\n".join(lines)


def plot(axes: "Axes", result: dict) -> None:
    for split, models in result["reconstruction"].items():
        for name, by_distance in models.items():
            axes.plot([int(m) for m in by_distance], [np.mean(v) for v in by_distance.values()], "o-",
                      label=f"{split}, {name}")  # fmt: skip
    axes.set(xlabel="layers between", ylabel="mean R^2", title="what a linear map finds of a lower layer")
    axes.legend()
