"""The long convolution and the filters of state space models, against SciPy and dense matrices in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import lfilter

from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.long_conv import diagonal, dplr, long_conv
from seqmodels.layers import hippo
from tests.kernels.helpers import assert_close, documents

E, T = 3, 150  # several levels of halves, and a piece of the last


def inputs(length=T, taps=T, seed=0):
    draw = np.random.default_rng(seed)
    sizes = dict(x=(2, length, E), weight=(taps, E), skip=(E,))
    return {name: draw.normal(size=size) for name, size in sizes.items()}


def of_dtype(args, dtype):
    return {name: jnp.asarray(v, dtype) for name, v in args.items()}


@functools.partial(jax.jit, static_argnames="implementation")
def value_and_gradients(args, static, implementation):
    y, pull = jax.vjp(lambda args: long_conv(**args, **static, implementation=implementation), args)
    dy = np.random.default_rng(7).normal(size=y.shape)
    if "mask" in static:
        dy = jnp.where(static["mask"][..., None], dy, 0)
    return y, pull(jnp.asarray(dy, y.dtype))[0]


def expected(args, static):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, value_and_gradients(of_dtype(args, "float64"), static, "reference"))


CASES = {
    "plain": (dict(), {}),
    "short": (dict(length=5), {}),
    "few taps": (dict(taps=21), documents(length=T)),
    "packed": (dict(), documents(length=T, padded=False)),
    "padded": (dict(), documents(length=T, packed=False)),
    "packed and padded": (dict(), documents(length=T)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_float64_reference(case):
    shape, static = CASES[case]
    args = inputs(**shape)
    got = value_and_gradients(of_dtype(args, "float32"), static, "xla")
    assert_close(got, expected(args, static), 1e-6)


def test_reference_equals_scipys_filter():
    args = inputs(taps=21)
    y, _ = expected(args, {})
    for e in range(E):
        taps = args["weight"][:, e] + args["skip"][e] * (np.arange(21) == 0)
        np.testing.assert_allclose(y[..., e], lfilter(taps, [1], args["x"][..., e], axis=1), rtol=1e-12, atol=1e-12)


def test_what_is_not_finite_stays_in_its_document():
    args = of_dtype(inputs(), "float32")
    ids = np.repeat([[0, 1, 2]] * 2, 50, axis=1).astype(np.int32)
    bad = (ids == 1)[..., None]
    y, gradients = value_and_gradients(args | dict(x=jnp.where(bad, jnp.nan, args["x"])), dict(segment_ids=ids), "xla")
    want, want_gradients = value_and_gradients(args, dict(segment_ids=ids), "xla")
    good = ~bad[..., 0]
    np.testing.assert_array_equal(y[good], want[good])
    np.testing.assert_array_equal(gradients["x"][good], want_gradients["x"][good])
    assert not np.isfinite(y[~good]).any()


def test_no_output_depends_on_a_later_token_even_by_rounding():
    args = of_dtype(inputs(), "float32")
    run = jax.jit(lambda x: long_conv(x, args["weight"]))
    for at in (1, 40, 128):
        np.testing.assert_array_equal(run(args["x"])[:, :at], run(args["x"].at[:, at:].add(100))[:, :at])


def test_memory_is_linear_in_time():
    """Forward and backward at T = 32,768, where there are 10 levels: some arrays of x's size a level."""
    x, weight = jax.ShapeDtypeStruct((1, 2**15, 4), "float32"), jax.ShapeDtypeStruct((2**15, 4), "float32")
    loss = jax.grad(lambda x, weight: jnp.sum(long_conv(x, weight) ** 2), argnums=(0, 1))
    memory = jax.jit(loss).lower(x, weight).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 5 * 10 * (4 * 2**15 * 4)


# Filters of state space models


def systems(states=16, channels=E, seed=0):
    """A perturbed LegS system with its readout, complex128; one of each conjugate pair."""
    draw, form = np.random.default_rng(seed), hippo.nplr(states)

    def perturbed(v):
        change = draw.normal(size=(2, states // 2, channels))
        return v[:, None] * np.exp(0.2 * change[0]) + 0.1j * change[1]

    step = np.exp(draw.uniform(np.log(1e-3), np.log(1e-1), channels))
    system = dplr.Dplr(*(perturbed(v) for v in form[:3]), step)
    return system, draw.normal(size=(states // 2, channels)) + 1j * draw.normal(size=(states // 2, channels))


def dense(system, c, e):
    """A, B, C and dt of one channel, with both states of each pair."""
    L, P, B, C = (np.concatenate([v[:, e], v[:, e].conj()]) for v in (*system[:3], c))
    return np.diag(L) - np.outer(P, P.conj()), B, C, system.dt[e]


def dense_filter(A, B, C, count):
    """C A^l B for l below count, by products with the matrix of a step."""
    taps = []
    for _ in range(count):
        taps.append((C @ B).real)
        B = A @ B
    return np.array(taps)


def bilinear(A, B, dt):
    """A step by solving with the dense matrix."""
    left = np.eye(len(A)) - dt / 2 * A
    return np.linalg.solve(left, np.eye(len(A)) + dt / 2 * A), np.linalg.solve(left, dt * B)


def single(tree):
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.complex64 if np.iscomplexobj(v) else jnp.float32), tree)


@pytest.mark.parametrize("length", [1, 37, 64])
def test_dplr_filter_equals_powers_of_the_dense_matrix(length):
    system, c = systems()
    got = jax.jit(dplr.dplr_filter, static_argnums=2)(*single((system, c)), length)
    parts = [dense(system, c, e) for e in range(E)]
    want = np.stack([dense_filter(*bilinear(A, B, dt), C, length) for A, B, C, dt in parts], axis=1)
    assert got.shape == (length, E)
    assert_close(got, want, 1e-5)


def test_a_bilinear_step_equals_the_dense_one():
    system, c = systems()
    draw = np.random.default_rng(1)
    h, x = draw.normal(size=(8, E)) + 1j * draw.normal(size=(8, E)), draw.normal(size=E)
    with jax.enable_x64(True):
        step = dplr.bilinear(jax.tree.map(jnp.asarray, system))
        new, power = np.asarray(step(h, x)), np.asarray(dplr.matrix(step))
    for e in range(E):
        A, B, _, dt = dense(system, c, e)
        A, B = bilinear(A, B, dt)
        want = (A @ np.concatenate([h[:, e], h[:, e].conj()]) + B * x[e])[:8]
        np.testing.assert_allclose(new[:, e], want, rtol=1e-12, atol=1e-13)
        flat = power[e] @ np.concatenate([h[:, e].real, h[:, e].imag])
        np.testing.assert_allclose(flat[:8] + 1j * flat[8:] + B[:8] * x[e], want, rtol=1e-12, atol=1e-13)
        assert np.linalg.norm(power[e], 2) < 1  # the docstring of Dplr: every state shrinks


@pytest.mark.parametrize("length", [1, 37, 64])
def test_diagonal_filter_equals_powers(length):
    system, c = systems()
    a = np.exp(system.dt * system.L)
    want = 2 * np.sum(c * a ** np.arange(length)[:, None, None], axis=1).real
    got = jax.jit(diagonal.diagonal_filter, static_argnums=2)(*single((a, c)), length)
    assert_close(got, want, 1e-5)


def test_a_zero_decay_has_a_filter_of_one_tap():
    a, c = jnp.zeros((1, 1), jnp.complex64), jnp.ones((1, 1), jnp.complex64)
    value, gradient = jax.value_and_grad(lambda a: jnp.sum(diagonal.diagonal_filter(a, c, 9)), holomorphic=False)(a)
    assert value == 2 and np.isfinite(gradient).all()


FILTERS = {
    "diagonal": lambda system, c, length: diagonal.diagonal_filter(jnp.exp(system.dt * system.L), c, length),
    "dplr": dplr.dplr_filter,
}


@pytest.mark.parametrize("kind", FILTERS)
def test_gradients_of_filters_equal_float64(kind, monkeypatch):
    """In several pieces of roots, of all parameters."""
    monkeypatch.setattr(dplr, "ELEMENTS", 5 * 8 * E)
    arguments, weight = systems(), np.random.default_rng(3).normal(size=(40, E))

    def gradient(arguments):
        return jax.jit(jax.grad(lambda a: jnp.sum(weight * FILTERS[kind](*a, 40))))(arguments)

    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, gradient(jax.tree.map(jnp.asarray, arguments)))
    parts = lambda tree: jax.tree.map(lambda v: (np.real(v), np.imag(v)), tree)  # noqa: E731
    assert_close(parts(gradient(single(arguments))), parts(want), 1e-4)


def test_gradients_of_the_dplr_filter_equal_finite_differences():
    system, c = systems(states=4)
    with jax.enable_x64(True):
        loss = jax.jit(lambda system: jnp.sum(jnp.sin(dplr.dplr_filter(system, c, 9))))
        slope = jax.grad(loss)(jax.tree.map(jnp.asarray, system))
        draw = np.random.default_rng(4)
        for name in system._fields:
            v = getattr(system, name)
            way = draw.normal(size=v.shape) * abs(v) * (1 if name == "dt" else np.exp(1j * draw.uniform(0, 6, v.shape)))
            ahead, back = (loss(system._replace(**{name: v + s * 1e-6 * way})) for s in (1, -1))
            np.testing.assert_allclose(np.sum(getattr(slope, name) * way).real, (ahead - back) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", FILTERS)
def test_filters_make_no_array_of_taps_states_and_channels(kind):
    length, states, channels = 4096, 32, 64
    whole = length * states * channels * 8
    shape = jax.ShapeDtypeStruct((states, channels), "complex64")
    system = dplr.Dplr(shape, shape, shape, jax.ShapeDtypeStruct((channels,), "float32"))
    loss = jax.grad(lambda system, c: jnp.sum(FILTERS[kind](system, c, length) ** 2))
    memory = jax.jit(loss).lower(system, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * whole


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(x=np.zeros((2, 5))), r"x has shape \(2, 5\)"),
        (dict(x=np.zeros((2, 0, E))), r"x has shape \(2, 0, 3\)"),
        (dict(weight=np.zeros((4, E + 1))), r"weight has shape \(4, 4\); allowed with x \(2, 150, 3\): \(L, 3\)"),
        (dict(skip=np.zeros(1)), "skip has shape"),
        (dict(mask=np.ones((2, 10), bool)), "mask has shape"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        long_conv(**inputs() | changed)


def test_unknown_implementation_is_named():
    with pytest.raises(UnsupportedError, match=r"'fft'.*reference, xla"):
        long_conv(**inputs(), implementation="fft")
