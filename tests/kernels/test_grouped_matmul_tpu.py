"""The TPU kernels of the grouped products: their numbers in Pallas's interpreter, their compilation ahead of time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.grouped_matmul import grouped_matmul, mosaic_tpu
from seqmodels.kernels.grouped_matmul.groups import visits
from seqmodels.kernels.interpreter import interpret
from tests.kernels.grouped_cases import by_hand, inputs, poisoned, products
from tests.kernels.helpers import assert_close, needs_libtpu, stacked

M, K, N, X = 37, 200, 136, 5  # three tiles of rows, two steps, two blocks of columns, padding on all axes
SIZES = {
    "uneven": (7, 9, 1, 12, 8),
    "empty groups": (0, 16, 0, 21, 0),
    "fewer rows": (5, 0, 11, 3, 0),  # the last tile has none
    "no row": (0, 0, 0, 0, 0),
}


@functools.cache
def run(dtype):
    return products(functools.partial(grouped_matmul, implementation="mosaic_tpu"))


@pytest.fixture
def interpreter(tpu_interpreter, monkeypatch):
    """Tiles of 16 x 128, and steps of 128."""
    for name, size in dict(ROWS=16, COLUMNS=128, STEP=128).items():
        monkeypatch.setattr(mosaic_tpu, name, size)


@pytest.mark.parametrize("sizes", SIZES)
def test_equals_a_loop(interpreter, sizes):
    """NaN in the rows of no group reaches nothing."""
    args = inputs(M, K, N, X)
    got = run("float32")(poisoned(args, SIZES[sizes]), SIZES[sizes])
    assert_close(got, by_hand(args, SIZES[sizes]), 1e-6)


def test_bfloat16_sums_in_float32(interpreter):
    """One rounding, at the end."""
    args, sizes = inputs(M, K, N, X, dtype=jnp.bfloat16), SIZES["fewer rows"]
    got = run("bfloat16")(poisoned(args, sizes), sizes)
    for x, want in zip(got, by_hand(args, sizes), strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(x.astype(jnp.float32), want, rtol=2**-8, atol=1e-4)


@pytest.mark.slow
def test_vmap(interpreter):
    args, sizes = [inputs(M, K, N, X, seed=seed) for seed in (0, 1)], [SIZES["uneven"], SIZES["fewer rows"]]
    got = jax.vmap(run("vmap"))(stacked(args), jnp.asarray(sizes))
    want = [by_hand(a, s) for a, s in zip(args, sizes, strict=True)]
    assert_close(got, [np.stack(x) for x in zip(*want, strict=True)], 1e-6)


@pytest.mark.slow
def test_no_races(interpreter):
    """Two cores share the work; no core reads or writes what the other may be writing."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    args, sizes = inputs(M, K, N, X), SIZES["uneven"]
    with interpret(detect_races=True, num_cores_or_threads=2):
        assert_close(run("races")(args, sizes), by_hand(args, sizes), 1e-6)
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("rows", [16, 64, 512])
def test_visits_are_all_pairs(rows):
    """Those of a tile and a group that have rows in common; every tile and every group once at least."""
    draw = np.random.default_rng(0)
    table = jax.jit(functools.partial(visits, rows=rows, tile=16))
    for case in range(20):
        sizes = draw.multinomial(rows - case * (case % 3 > 0) % rows, draw.dirichlet(np.full(6, 0.5)))
        group, tile, start, end = map(np.asarray, table(jnp.asarray(sizes, jnp.int32)))
        assert (np.diff(group) >= 0).all() and set(group) == set(range(6))
        assert (np.diff(tile) >= 0).all() and set(tile) == set(range(rows // 16))
        own = {(g, t) for g, t, s, e in zip(group, tile, start, end, strict=True) if s < e}
        owner = np.repeat(np.arange(6), sizes)
        assert own == {(g, row // 16) for row, g in enumerate(owner)}
        assert len(own) == np.sum(start < end)


def test_reasons():
    assert mosaic_tpu.supports(platform="tpu") is None
    assert "needs a TPU" in mosaic_tpu.supports(platform="cuda")
    assert "float64" in mosaic_tpu.supports(platform="tpu", dtype=np.dtype("float64"))
    assert "empty" in mosaic_tpu.supports(platform="tpu", rows=0)
    if jax.default_backend() != "tpu":
        args = inputs()
        with pytest.raises(UnsupportedError, match="needs a TPU"):
            grouped_matmul(args["x"], args["w"], jnp.zeros(5, jnp.int32), implementation="mosaic_tpu")


@needs_libtpu
@pytest.mark.parametrize(
    "chip, shape, dtype",
    [
        ("v5e", (8192, 4096, 14336, 16), "bfloat16"),
        ("v5p", (300, 200, 136, 5), "float32"),
        ("v6e", (8, 4096, 1408, 64), "bfloat16"),
    ],
)
def test_compiles_for_tpu(chip, shape, dtype):
    """All three products: the interpreter takes what the compiler refuses."""
    from benchmarks import tpu_aot

    rows, inner, outer, groups = shape
    array = functools.partial(jax.ShapeDtypeStruct, sharding=tpu_aot.sharding(chip))
    args = array((rows, inner), dtype), array((groups, inner, outer), dtype), array((rows, outer), dtype)

    def call(x, w, dy, sizes):
        given = mosaic_tpu.grouped_matmul(x, w, sizes), mosaic_tpu.transposed(dy, w, sizes)
        return *given, mosaic_tpu.weight_gradient(x, dy, sizes)

    text = jax.jit(call).lower(*args, array((groups,), jnp.int32)).compile().as_text()
    assert all(f"grouped_matmul_{name}" in text for name in ("forward", "transposed", "weights"))
