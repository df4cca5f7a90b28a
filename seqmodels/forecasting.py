"""Forecasts by a model of the next value: its predictions are fed back, one step at a time, with its state."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from seqmodels.model import SequenceModel, head_of


@functools.partial(jax.jit, static_argnames=("model", "steps"))
def feed_back(
    model: SequenceModel, params: Any, values: jax.Array, steps: int, observed: jax.Array | None = None
) -> jax.Array:
    """The `steps` values [B, steps, C] float32 that a causal model with the head next_value or forecast expects next.

    Each is the mean that the model predicts behind the values before it; of the head forecast, its first step.

    Args:
        values: [B, T, C], all of them real positions. observed: [B, T, C] bool, False on missing values, or None.

    Raises:
        UserError: the model has no state.
    """
    variables, head = {"params": params}, head_of(model.config)
    gaps: dict[str, Any] = {} if observed is None else {"observed": observed}
    state: Any = model.init_state(len(values), values.shape[1] + steps)
    hidden, state = model.apply(variables, values, state=state, **gaps)

    def expected(hidden):
        return head.next_of(model.apply(variables, hidden[:, -1:], method="outputs"))

    def step(carry, _):
        value, state = carry
        hidden, state = model.apply(variables, value, state=state)
        return (expected(hidden), state), value[:, 0]

    _, found = jax.lax.scan(step, (expected(hidden), state), length=steps)
    return jnp.swapaxes(found, 0, 1)
