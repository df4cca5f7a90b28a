"""Every implementation of the short convolution against the sequential float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels import short_conv as op
from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.short_conv import short_conv, xla
from tests.kernels.helpers import (
    assert_close,
    compiled,
    expected,
    in_two_calls,
    poisoned,
    serving,
    stacked,
    value_and_gradients,
)
from tests.kernels.inputs import short_conv_inputs as inputs
from tests.kernels.short_layouts import BATCH, LAYOUTS, LENGTH

SILU = dict(activation="silu")

SERVING = serving(op)
BACKENDS = [name for name in SERVING if name != "reference"]


def by_hand(x, weight, bias, initial_state, segment_ids=None, initial_segment=None, mask=None):
    """The convolution as one says it in words: a growing list of the real inputs of the current document."""
    taps = len(weight)
    y, final = np.zeros_like(x), np.zeros_like(initial_state)
    for row in range(len(x)):
        seen = list(initial_state[row])
        document = None if initial_segment is None else initial_segment[row]
        for t in range(x.shape[1]):
            if mask is not None and not mask[row, t]:
                continue
            if segment_ids is not None:
                if document is not None and segment_ids[row, t] != document:
                    seen = []
                document = segment_ids[row, t]
            seen.append(x[row, t])
            y[row, t] = bias + sum(weight[taps - 1 - k] * seen[-1 - k] for k in range(min(taps, len(seen))))
        seen = ([np.zeros_like(bias)] * taps + seen)[-(taps - 1) :]
        final[row] = np.stack(seen)
    return y, final


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("taps", [2, 5])
def test_reference_is_the_definition(taps, layout):
    args = inputs(taps, dtype=np.float64)
    with jax.enable_x64(True):
        got = compiled(short_conv, "reference")(**args, **LAYOUTS[layout])
    assert_close(got, by_hand(**args, **LAYOUTS[layout]), 1e-14)


@pytest.mark.parametrize(
    "taps, layout", [(4, layout) for layout in LAYOUTS] + [(n, "packed and padded") for n in (2, 8)]
)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_equals_float64_reference(implementation, taps, layout):
    args, static = inputs(taps), LAYOUTS[layout]
    got = value_and_gradients(short_conv, args, static, implementation, SILU)
    assert_close(got, expected(short_conv, args, static, SILU), 1e-6)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_without_bias_and_state(implementation):
    args = inputs(length=2)  # shorter than the taps
    args = dict(x=args["x"], weight=args["weight"])
    got = value_and_gradients(short_conv, args, {}, implementation, SILU)
    assert_close(got, expected(short_conv, args, {}, SILU), 1e-6)


@pytest.mark.parametrize("implementation", SERVING)
@pytest.mark.parametrize("cut", [1, 4, 8])
def test_state_carries_over(implementation, cut):
    """Two calls are one; the state's document is the caller's to remember."""
    args, layout = inputs(), LAYOUTS["packed and padded"]
    conv = compiled(short_conv, implementation)
    assert_close(in_two_calls(conv, args, layout, cut, ("x",)), conv(**args, **layout), 1e-6)


@pytest.mark.parametrize("implementation", SERVING)
def test_poisoned_padding_never_leaks(implementation):
    args, layout = inputs(), LAYOUTS["packed and padded"]
    hidden = poisoned(args, layout["mask"], ("x",))
    got = value_and_gradients(short_conv, hidden, layout, implementation, SILU)
    assert_close(got, value_and_gradients(short_conv, args, layout, implementation, SILU), 1e-7)
    y, _ = compiled(short_conv, implementation)(**hidden, **layout)
    assert not y[~layout["mask"]].any()


@pytest.mark.parametrize("implementation", SERVING)
@pytest.mark.parametrize("layout", ["plain", "packed and padded"])
def test_bfloat16_sums_in_float32(implementation, layout):
    half = {name: jnp.asarray(value, jnp.bfloat16) for name, value in inputs().items()}
    y, state = compiled(short_conv, implementation)(**half, **LAYOUTS[layout])
    wide = {name: value.astype(jnp.float32) for name, value in half.items()}
    want, want_state = compiled(short_conv, "reference")(**wide, **LAYOUTS[layout])
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=2**-8, atol=1e-6)  # one rounding, at the end
    np.testing.assert_array_equal(state, want_state)


@pytest.mark.parametrize("implementation", SERVING)
def test_vmap(implementation):
    args = [inputs(seed=seed) for seed in (0, 1)]

    def run(args):
        return value_and_gradients(short_conv, args, LAYOUTS["packed and padded"], implementation, SILU)

    assert_close(jax.vmap(run)(stacked(args)), stacked([run(a) for a in args]), 1e-6)


def test_no_cost_without_documents_and_padding():
    text = jax.jit(lambda args: short_conv(**args, implementation="xla")).lower(inputs()).as_text()
    assert not any(op in text for op in ("stablehlo.select", "stablehlo.sort", "stablehlo.gather", "stablehlo.compare"))


@pytest.mark.parametrize("length", [9, 2 * xla.CHUNK, 2 * xla.CHUNK + 5])
def test_sums_of_other_platforms(monkeypatch, length):
    """The gradients of weight and bias, summed as a GPU and a TPU do."""
    monkeypatch.setattr(xla, "_sums", lambda arrays: xla._sums_together(*arrays))
    args = inputs(length=length)
    got = value_and_gradients(short_conv, args, {}, "xla", SILU, patched="together")
    assert_close(got, expected(short_conv, args, {}, SILU), 1e-6)


def test_xla_in_float64():
    with jax.enable_x64(True):
        args, layout = inputs(dtype=np.float64), LAYOUTS["packed and padded"]
        got = value_and_gradients(short_conv, args, layout, "xla", SILU)
    assert_close(got, expected(short_conv, args, layout, SILU), 1e-13)


@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_backward_keeps_the_input_alone(layout):
    """Of all that has a token axis: x in its own dtype, and one number a token where documents are packed."""
    args = inputs()
    args["x"] = jnp.asarray(args["x"], jnp.bfloat16)
    _, transpose = jax.vjp(lambda args: short_conv(**args, **LAYOUTS[layout], activation="silu")[0], args)
    kept = [v for v in jax.tree.leaves(transpose) if v.shape[:2] == (BATCH, LENGTH)]
    assert [v.dtype for v in kept if v.ndim == 3] == [jnp.bfloat16]
    assert len(kept) <= 2


@pytest.mark.parametrize("implementation", BACKENDS)
def test_bfloat16_gradients(implementation):
    """Against the reference at the same rounded inputs: dx has one more rounding, sums over tokens are float32."""
    half = {name: jnp.asarray(value, jnp.bfloat16) for name, value in inputs(length=200).items()}
    wide = {name: value.astype(jnp.float32) for name, value in half.items()}
    got = value_and_gradients(short_conv, half, {}, implementation, SILU)[1]
    assert got["x"].dtype == jnp.bfloat16
    assert_close(got, value_and_gradients(short_conv, wide, {}, "reference", SILU)[1], 5e-3)


def test_bad_arguments_are_named():
    args = inputs()
    with pytest.raises(UnsupportedError, match=r"'cuda'.*reference, xla, mosaic_gpu"):
        short_conv(**args, implementation="cuda")
    with pytest.raises(ValueError, match="2 to 8 taps, got 1"):
        short_conv(args["x"], args["weight"][:1])
    with pytest.raises(ValueError, match=r"activation .* 'relu'"):
        short_conv(**args, activation="relu")
    with pytest.raises(ValueError, match="initial_state must be"):
        short_conv(**{**args, "initial_state": args["initial_state"][:, 1:]})
    with pytest.raises(ValueError, match="bias must be"):
        short_conv(**{**args, "bias": args["bias"][1:]})
    with pytest.raises(ValueError, match=r"weight \[W, E\]"):
        short_conv(**{**args, "weight": args["weight"][:, 1:]})
