"""The GPU kernels of the grouped products: their numbers in Pallas's GPU interpreter, their compilation ahead of time.

The interpreter takes seconds to compile a kernel, and each is compiled once for all sizes of groups.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels import grouped_matmul as op
from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.grouped_matmul import grouped_matmul, mosaic_gpu
from seqmodels.kernels.grouped_matmul.groups import most_tiles, row_tiles
from seqmodels.kernels.grouped_matmul.mosaic_gpu import pipeline
from seqmodels.kernels.grouped_matmul.mosaic_gpu.pipeline import ROWS
from seqmodels.kernels.interpreter import interpret
from tests.kernels.grouped_cases import by_hand, check_a_row_that_is_not_finite, inputs, poisoned, products
from tests.kernels.helpers import SHARED_MEMORY, assembled, assert_close, needs_cuda_plugin

M, K, N, X = 300, 64, 320, 4  # two tiles to the right, the second of which is cut
SIZES = {
    "fewer rows": (150, 0, 37, 90),  # tiles that overlap, parts of tiles, 23 rows of no group
    "around a tile": (1, 128, 129, 42),
    "one group": (0, 0, 300, 0),
    "no row": (0, 0, 0, 0),
}
FACTS = dict(rows=M, inner=K, outer=N, groups=X, dtype=np.dtype("bfloat16"))


@functools.cache
def run(dtype):
    return products(functools.partial(grouped_matmul, implementation="mosaic_gpu"))


@pytest.fixture
def interpreter(gpu_interpreter, monkeypatch):
    """Two blocks, which share the tiles."""
    if jax.default_backend() != "gpu":
        monkeypatch.setattr(pipeline, "processors", lambda: 2)


@pytest.mark.parametrize(
    "sizes", [*list(SIZES)[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in list(SIZES)[2:])]
)
def test_equals_a_loop(interpreter, sizes):
    """NaN in the rows of no group reaches nothing, and one rounding, at the end."""
    sizes = SIZES[sizes]
    args = inputs(M, K, N, X, dtype=jnp.bfloat16)
    got = run("bfloat16")(poisoned(args, sizes), sizes)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    for x, want in zip(got, by_hand(args, sizes), strict=True):
        np.testing.assert_allclose(x.astype(jnp.float32), want, rtol=2**-8, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # of the interpreter's NumPy
def test_a_row_that_is_not_finite_stays_alone(interpreter):
    sizes = SIZES["fewer rows"]
    args = poisoned(inputs(M, K, N, X, dtype=jnp.bfloat16), sizes)
    check_a_row_that_is_not_finite(run("bfloat16"), args, sizes, 2**-7)


@pytest.mark.slow
def test_few_rows_and_float16(interpreter):
    """Fewer rows than a tile has, as in decoding."""
    sizes = (3, 0, 1, 2)
    args = inputs(13, 64, 128, 4, dtype=jnp.float16)
    got = run("float16")(poisoned(args, sizes), sizes)
    assert_close(got, by_hand(args, sizes), 1e-3)


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the interpreter finds races")
def test_no_races(interpreter):
    """Where no tiles overlap: those that do write the same numbers twice."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    args, sizes = inputs(M, K, N, X, dtype=jnp.bfloat16), (128, 0, 29, 100)
    with interpret(detect_races=True):
        got = run("races")(poisoned(args, sizes), sizes)
        assert_close(got, by_hand(args, sizes), 1e-2)
    assert not interpret_pallas_call.get_races().races_found


@pytest.mark.parametrize("rows", [300, 128, 1000])
def test_tiles_cover_each_row(rows):
    """Tiles lie within one group, and each row is in one of those of its group."""
    draw = np.random.default_rng(0)
    table = jax.jit(functools.partial(row_tiles, rows=rows, tile=ROWS))
    for case in range(20):
        sizes = draw.multinomial(rows - case * (case % 3), draw.dirichlet(np.full(5, 0.5)))
        ends = [*np.cumsum(sizes), rows]
        group, start, count, used = map(np.asarray, table(jnp.asarray(sizes, jnp.int32)))
        assert used[0] <= len(group) == most_tiles(rows, 5, ROWS)
        assert not count[used[0] :].any() and count[: used[0]].all()
        covered = np.full(rows, -1)
        for g, first, own in zip(group, start, count, strict=True):
            assert own in (0, ROWS, [*sizes, rows - sum(sizes)][g])
            covered[first : first + own] = g
        np.testing.assert_array_equal(covered, np.searchsorted(ends, np.arange(rows), side="right"))


def test_reasons():
    assert mosaic_gpu.supports(platform="cuda", **FACTS) is None
    assert "needs an NVIDIA GPU" in mosaic_gpu.supports(platform="cpu", **FACTS)
    assert "float32" in mosaic_gpu.supports(platform="cuda", **FACTS | dict(dtype=np.dtype("float32")))
    assert "multiples of 64" in mosaic_gpu.supports(platform="cuda", **FACTS | dict(inner=72))
    assert "0 rows" in mosaic_gpu.supports(platform="cuda", **FACTS | dict(rows=0))
    assert op.choose("cuda", **FACTS)[0] == "mosaic_gpu"
    if jax.default_backend() != "gpu":
        args = inputs(M, K, N, X, dtype=jnp.bfloat16)
        with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU"):
            grouped_matmul(args["x"], args["w"], jnp.zeros(X, jnp.int32), implementation="mosaic_gpu")


def test_the_dense_expansion_is_no_secret(monkeypatch, caplog):
    """Where the kernels cannot serve, XLA's memory on a GPU is told, once."""
    monkeypatch.setattr(op.dispatch, "platforms", lambda: ("cpu", "cuda"))
    op.warn_of_expansion.cache_clear()
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8192, 4096), (16, 4096, 14336))]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            jax.eval_shape(grouped_matmul, *shapes, jax.ShapeDtypeStruct((16,), jnp.int32))
    (said,) = [r.getMessage() for r in caplog.records]
    assert "float32" in said and "16 times" in said and "2.0 GiB forward and 10.5 backward" in said


@pytest.mark.skipif(needs_cuda_plugin.args[0] is False, reason="it is compiled, see test_compiles_into_registers")
def test_lowers_for_cuda():
    """By jax 0.10, which has no interpreter."""
    args = inputs(M, K, N, X, dtype=jnp.bfloat16)

    def gradients(x, w, dy, sizes):
        y, pull = jax.vjp(functools.partial(op.product, mosaic_gpu, sizes=sizes), x, w)
        return y, pull(dy)

    traced = jax.jit(gradients).trace(args["x"], args["w"], args["dy"], jnp.asarray(SIZES["one group"]))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") >= 3


@needs_cuda_plugin
@pytest.mark.parametrize("shape", ["300x64x320x4", pytest.param("8192x4096x14336x16", marks=pytest.mark.slow)])
def test_compiles_into_registers(shape):
    """The interpreter takes what the compiler refuses."""
    shared, spilled = assembled("grouped_matmul", shape, "bfloat16")
    assert spilled == [0, 0, 0] and all(n < SHARED_MEMORY for n in shared)
