"""Every implementation of the short convolution against the sequential float64 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels import short_conv as op
from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.short_conv import short_conv, xla

SERVING = [name for name, backend in op.BACKENDS.items() if backend.supports(platform=jax.default_backend()) is None]
BACKENDS = [name for name in SERVING if name != "reference"]
BATCH, LENGTH, WIDTH = 3, 9, 5


def inputs(taps=4, length=LENGTH, seed=0, dtype=np.float32, batch=BATCH, width=WIDTH):
    draw = np.random.default_rng(seed)
    args = dict(
        x=draw.normal(size=(batch, length, width)),
        weight=draw.normal(size=(taps, width)),
        bias=draw.normal(size=width),
        initial_state=draw.normal(size=(batch, taps - 1, width)),
    )
    return {name: np.asarray(value, dtype) for name, value in args.items()}


SEGMENTS = np.array(
    [
        [0, 0, 0, 1, 1, 0, 0, 0, 0],  # document 0 comes back: it starts anew
        [4, 4, 4, 4, 4, 4, 4, 5, 5],  # a state of fewer tokens than taps
        [2, 2, 3, 3, 3, 3, 3, 3, 7],  # the state belongs to another document
    ],
    np.int32,
)
INITIAL_SEGMENT = np.array([0, 4, 9], np.int32)
MASKS = {
    "left": np.arange(LENGTH) >= np.array([[0], [3], [8]]),
    "right": np.arange(LENGTH) < np.array([[9], [5], [1]]),
    "interior": np.array([[1, 0, 1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0, 1, 1], [0, 0, 1, 0, 1, 0, 1, 0, 0]], bool),
    "whole rows": np.arange(LENGTH) * np.array([[0], [1], [0]]) > 0,
}
LAYOUTS = {
    "plain": {},
    "packed": dict(segment_ids=SEGMENTS, initial_segment=INITIAL_SEGMENT),
    "packed, the state goes on": dict(segment_ids=SEGMENTS),
    **{f"padded, {name}": dict(mask=mask) for name, mask in MASKS.items()},
    "packed and padded": dict(segment_ids=SEGMENTS, initial_segment=INITIAL_SEGMENT, mask=MASKS["interior"]),
    "packed and padded, the state goes on": dict(segment_ids=SEGMENTS, mask=MASKS["left"]),
}


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


def value_and_gradients(args, static, implementation):
    """Output, final state, and the gradients of a random functional of both."""

    def outputs(args):
        return short_conv(**args, **static, activation="silu", implementation=implementation)

    def functional(args):
        draw = np.random.default_rng(7)
        return sum(jnp.sum(x * jnp.asarray(draw.normal(size=x.shape), x.dtype)) for x in outputs(args))

    return jax.jit(outputs)(args), jax.jit(jax.grad(functional))(args)


def assert_close(ours, reference, tolerance):
    """Relative error of each array in the Frobenius norm."""
    for (path, x), want in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(reference), strict=True):
        x, want = np.asarray(x, np.float64), np.asarray(want, np.float64)
        error = np.linalg.norm(x - want) / max(np.linalg.norm(want), 1e-30)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.2e}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("taps", [2, 5])
def test_reference_is_the_definition(taps, layout):
    args = inputs(taps, dtype=np.float64)
    with jax.enable_x64(True):
        got = short_conv(**args, **LAYOUTS[layout], implementation="reference")
    assert_close(got, by_hand(**args, **LAYOUTS[layout]), 1e-14)


@pytest.mark.parametrize(
    "taps, layout", [(4, layout) for layout in LAYOUTS] + [(n, "packed and padded") for n in (2, 8)]
)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_equals_float64_reference(implementation, taps, layout):
    with jax.enable_x64(True):
        want = value_and_gradients(inputs(taps, dtype=np.float64), LAYOUTS[layout], "reference")
    assert_close(value_and_gradients(inputs(taps), LAYOUTS[layout], implementation), want, 1e-6)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_without_bias_and_state(implementation):
    args = inputs(length=2)  # shorter than the taps
    args = dict(x=args["x"], weight=args["weight"])
    with jax.enable_x64(True):
        double = {name: value.astype(np.float64) for name, value in args.items()}
        want = value_and_gradients(double, {}, "reference")
    assert_close(value_and_gradients(args, {}, implementation), want, 1e-6)


@pytest.mark.parametrize("implementation", SERVING)
@pytest.mark.parametrize("cut", [1, 4, 8])
def test_state_carries_over(implementation, cut):
    """Two calls are one; the state's document is the caller's to remember."""
    args, layout = inputs(), LAYOUTS["packed and padded"]
    whole = short_conv(**args, **layout, implementation=implementation)
    mask, segments = layout["mask"], layout["segment_ids"]
    first, state = short_conv(
        args["x"][:, :cut],
        args["weight"],
        args["bias"],
        initial_state=args["initial_state"],
        segment_ids=segments[:, :cut],
        initial_segment=INITIAL_SEGMENT,
        mask=mask[:, :cut],
        implementation=implementation,
    )
    last = [ids[:cut][real[:cut]] for ids, real in zip(segments, mask, strict=True)]
    second, state = short_conv(
        args["x"][:, cut:],
        args["weight"],
        args["bias"],
        initial_state=state,
        segment_ids=segments[:, cut:],
        initial_segment=np.array([[i, *ids][-1] for i, ids in zip(INITIAL_SEGMENT, last, strict=True)], np.int32),
        mask=mask[:, cut:],
        implementation=implementation,
    )
    assert_close((jnp.concatenate([first, second], axis=1), state), whole, 1e-6)


@pytest.mark.parametrize("implementation", SERVING)
def test_poisoned_padding_never_leaks(implementation):
    args, layout = inputs(), LAYOUTS["packed and padded"]
    poisoned = {**args, "x": np.where(layout["mask"][..., None], args["x"], np.nan)}
    got = value_and_gradients(poisoned, layout, implementation)
    assert_close(got, value_and_gradients(args, layout, implementation), 1e-7)
    assert not got[0][0][~layout["mask"]].any()


@pytest.mark.parametrize("implementation", SERVING)
@pytest.mark.parametrize("layout", ["plain", "packed and padded"])
def test_bfloat16_sums_in_float32(implementation, layout):
    half = {name: jnp.asarray(value, jnp.bfloat16) for name, value in inputs().items()}
    y, state = short_conv(**half, **LAYOUTS[layout], implementation=implementation)
    wide = {name: value.astype(jnp.float32) for name, value in half.items()}
    want, want_state = short_conv(**wide, **LAYOUTS[layout], implementation="reference")
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=2**-8, atol=1e-6)  # one rounding, at the end
    np.testing.assert_array_equal(state, want_state)


@pytest.mark.parametrize("implementation", SERVING)
def test_vmap(implementation):
    args = [inputs(seed=seed) for seed in (0, 1)]
    f = functools.partial(value_and_gradients, static=LAYOUTS["packed and padded"], implementation=implementation)
    stacked, want = (jax.tree.map(lambda *x: jnp.stack(x), *trees) for trees in (args, [f(a) for a in args]))
    assert_close(jax.vmap(f)(stacked), want, 1e-6)


def test_no_cost_without_documents_and_padding():
    text = jax.jit(lambda args: short_conv(**args, implementation="xla")).lower(inputs()).as_text()
    assert not any(op in text for op in ("stablehlo.select", "stablehlo.sort", "stablehlo.gather", "stablehlo.compare"))


@pytest.mark.parametrize("length", [9, 2 * xla.CHUNK, 2 * xla.CHUNK + 5])
def test_sums_of_other_platforms(monkeypatch, length):
    """The gradients of weight and bias, summed as a GPU and a TPU do."""
    monkeypatch.setattr(xla, "_sums", lambda arrays: xla._sums_together(*arrays))
    with jax.enable_x64(True):
        want = value_and_gradients(inputs(length=length, dtype=np.float64), {}, "reference")
    assert_close(value_and_gradients(inputs(length=length), {}, "xla"), want, 1e-6)


def test_xla_in_float64():
    with jax.enable_x64(True):
        args, layout = inputs(dtype=np.float64), LAYOUTS["packed and padded"]
        want = value_and_gradients(args, layout, "reference")
        assert_close(value_and_gradients(args, layout, "xla"), want, 1e-13)


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
    got = value_and_gradients(half, {}, implementation)[1]
    assert got["x"].dtype == jnp.bfloat16
    assert_close(got, value_and_gradients(wide, {}, "reference")[1], 5e-3)


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
