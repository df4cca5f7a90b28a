"""Matrix products: several products kept separate, and products with a wider dtype than their factors."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from seqmodels.parallel import manual, mesh_axes


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., D] times w [D, E].

    The gradient of w is computed as x^T dy. JAX's own rule computes dy^T x and transposes that. For this XLA computes
    dy once more on a CPU, transposed, with all elementwise operations before it.
    """
    return x @ w


def _matmul_backward(inputs, dy):
    x, w = inputs
    rows = tuple(range(x.ndim - 1))
    return dy @ w.T, jax.lax.dot_general(x, dy, ((rows, rows), ((), ())))


matmul.defvjp(lambda x, w: (matmul(x, w), (x, w)), _matmul_backward)


def separate_matmuls(inputs: tuple[jax.Array, ...], weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Each input [B, T, D], which may be the same, times its weight [D, E], as separate products.

    XLA would merge them into one product and then copy its result apart. The copies cost more than the merge saves.
    Optimization barriers hide from XLA that the left factors are equal. Each weight gets one barrier more than the one
    before it; with equal numbers of barriers, the factors would be equal again.

    On a mesh that splits E the gradients of products of the same input are added up before the devices exchange their
    sum. XLA would exchange each of them.
    """
    split = mesh_axes(inner=weights[0].shape[1]) or {}
    if (axes := split.get("inner")) and len({weight.shape for weight in weights}) == 1:
        return _on_devices(axes, inputs, weights)
    products, hidden = [], dict[int, jax.Array]()
    for x, weight in zip(inputs, weights, strict=True):
        factor = hidden[id(x)] = jax.lax.optimization_barrier(hidden[id(x)]) if id(x) in hidden else x
        products.append(matmul(factor, weight))
    return tuple(products)


def _on_devices(axes, inputs, weights):
    distinct = {id(x): x for x in inputs}
    ys = {}
    for x in distinct.values():
        own = [i for i, each in enumerate(inputs) if each is x]
        ys |= dict(zip(own, _columns(axes, x, tuple(weights[i] for i in own)), strict=True))
    return tuple(ys[i] for i in range(len(inputs)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _columns(axes: tuple[str, ...], x: jax.Array, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """x [B, T, D] times each weight [D, E], whose columns are split over mesh `axes`."""
    return tuple(x @ weight for weight in weights)


def _columns_backward(axes, inputs, dys):
    x, weights = inputs

    def add(dys, weights):
        dx = sum(jnp.einsum("bte,de->btd", dy, weight) for dy, weight in zip(dys, weights, strict=True))
        return jax.lax.psum(dx, axes)

    specs = PartitionSpec(None, None, axes), PartitionSpec(None, axes)
    dx = jax.shard_map(add, in_specs=specs, out_specs=PartitionSpec(), axis_names=manual(axes), check_vma=False)(
        dys, weights
    )
    return dx, tuple(jnp.einsum("btd,bte->de", x, dy) for dy in dys)


_columns.defvjp(lambda axes, x, weights: (_columns(axes, x, weights), (x, weights)), _columns_backward)


@jax.custom_vjp
def wide_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [B, T, D] times w [D, V] in float32. The backward pass rounds the gradient of y to the dtype of x."""
    return jnp.einsum("btd,dv->btv", x, w, preferred_element_type=jnp.float32)


def _wide_matmul_backward(inputs, dy):
    x, w = inputs
    dy = dy.astype(x.dtype)
    return jnp.einsum("btv,dv->btd", dy, w), jnp.einsum("btd,btv->dv", x, dy)


wide_matmul.defvjp(lambda x, w: (wide_matmul(x, w), (x, w)), _wide_matmul_backward)
