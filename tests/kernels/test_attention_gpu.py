"""The GPU kernels of attention: their tables of tiles, numbers in Pallas's GPU interpreter, compilation ahead of time.

The interpreter multiplies by jax.numpy what the tensor cores multiply, everything else it runs as it stands. On a
machine with such a GPU the kernels themselves run, in more cases:

    JAX_PLATFORMS=cuda XLA_FLAGS= python -m pytest -n 0 tests/kernels/test_attention_gpu.py -k "not compile"
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels import attention as op
from seqmodels.kernels.attention import attention, mosaic_gpu
from seqmodels.kernels.attention.arguments import Tokens
from seqmodels.kernels.attention.masks import BigBird, Fixed, Mask, Strided
from seqmodels.kernels.attention.mosaic_gpu import backward, block, forward, given_of
from seqmodels.kernels.attention.mosaic_gpu.places import Places
from seqmodels.kernels.attention.mosaic_gpu.tables import ROWS, Documents, Given, visits
from seqmodels.kernels.attention.visible import visible
from seqmodels.kernels.dispatch import UnsupportedError
from tests.kernels.helpers import SHARED_MEMORY, assembled, needs_cuda_plugin

GPU = jax.default_backend() == "gpu"
ROUNDINGS = 2**-7  # of weights, their gradients and the result, to bfloat16


def packed(length, seed=1, batch=2):
    """Rows of about five documents each."""
    return np.cumsum(np.random.default_rng(seed).random((batch, length)) < 5 / length, axis=1).astype(np.int32)


def some(length, share=0.7):
    return np.random.default_rng(3).random((2, length)) < share


def padded(length):
    """Documents as models give them: padding sees nothing but itself, and no other query sees it."""
    ids, real = packed(length), some(length)
    return dict(segment_ids=np.where(real, ids, -1), key_segment_ids=np.where(real, ids, -2))


def placed(length):
    """Documents, with positions counted in each."""
    ids = packed(length)
    return dict(segment_ids=ids, positions=within(ids))


def within(ids):
    """[B, T]: how many tokens of its document come before each token."""
    place = np.arange(ids.shape[1], dtype=np.int32)
    starts = np.where(np.diff(ids, axis=1, prepend=ids[:, :1] - 1) != 0, place, 0)
    return place - np.maximum.accumulate(starts, axis=1)


def among_padding(length):
    """Documents with padding, and positions that count real tokens, as models give them with a window."""
    real = some(length)
    return padded(length) | dict(positions=np.cumsum(real, axis=1, dtype=np.int32) - real)


BLOCK, LOWEST = 128, np.iinfo(np.int32).min
# (T, H, Hkv, d), then options
CASES = {
    "documents": ((300, 2, 1, 64), dict(segment_ids=packed(300) + LOWEST, key_mask=some(300))),
    "pattern in a window": ((384, 2, 2, 64), dict(pattern=BigBird(1, 0, 1, 64, 1), window=200)),
    "pattern of documents": ((300, 2, 1, 64), dict(pattern=BigBird(1, 0, 1, 64, 1), window=170, **placed(300))),
}
ON_GPU = {
    "causal": ((1500, 4, 4, 64), {}),
    "one tile": ((7, 4, 2, 64), {}),
    "wide": ((1000, 4, 2, 128), {}),
    "full": ((1024, 4, 1, 64), dict(causal=False, scale=0.2)),
    "full, ragged": ((1100, 2, 1, 128), dict(causal=False)),
    "window": ((1100, 2, 1, 64), dict(window=150)),
    "window of few": ((700, 2, 1, 128), dict(window=3, sinks=2)),
    "sinks": ((1100, 2, 1, 64), dict(window=200, sinks=130)),
    "window, not causal": ((640, 2, 1, 64), dict(window=100, causal=False)),
    "long documents": ((2048, 4, 2, 64), dict(segment_ids=packed(2048))),
    "wide documents": ((900, 4, 2, 128), dict(segment_ids=packed(900), window=170)),
    "documents in any order": ((600, 2, 1, 64), dict(segment_ids=packed(600) * 7 % 3 - 1)),
    "documents, not causal": ((900, 2, 1, 64), dict(segment_ids=packed(900), causal=False)),
    "padding of documents": ((900, 2, 1, 64), padded(900)),
    "mask": ((700, 2, 1, 64), dict(key_mask=some(700, 0.3))),
    "mask, not causal": ((700, 2, 1, 128), dict(key_mask=some(700, 0.3), causal=False)),
    "nothing to see": ((256, 2, 1, 64), dict(key_mask=np.zeros((2, 256), bool))),
    "window among padding": ((900, 2, 1, 64), dict(window=150, **among_padding(900))),
    "sinks of documents": ((1100, 2, 1, 128), dict(window=70, sinks=30, **placed(1100))),
    "positions, not causal": ((900, 2, 1, 64), dict(window=70, causal=False, **placed(900))),
    "strided": ((2048, 2, 1, 64), dict(pattern=Strided(3, BLOCK))),
    "strided in documents": ((2048, 2, 1, 64), dict(pattern=Strided(2, 64), **placed(2048))),
    "fixed in documents": ((2000, 2, 1, 128), dict(pattern=Fixed(3, 1, 64), **placed(2000))),
    "BigBird in documents": ((2048, 4, 2, 64), dict(pattern=BigBird(2, 1, 3, 64), **placed(2048))),
    "small blocks": ((1000, 2, 1, 128), dict(pattern=Fixed(3, 1, 64), segment_ids=packed(1000))),
    "small blocks, not causal": ((1024, 2, 1, 64), dict(pattern=Strided(2, 64), causal=False)),
    "fixed": ((2048, 2, 1, 128), dict(pattern=Fixed(4, 1, BLOCK))),
    "BigBird": ((2000, 2, 1, 64), dict(pattern=BigBird(2, 1, 2, BLOCK))),
    "BigBird, not causal": ((2048, 2, 1, 64), dict(pattern=BigBird(2, 1, 2, 2 * BLOCK), causal=False)),
    "BigBird of documents": ((2048, 2, 1, 128), dict(pattern=BigBird(2, 1, 2, BLOCK), segment_ids=packed(2048))),
}


@pytest.fixture
def interpreter(gpu_interpreter, monkeypatch):
    """In the interpreter two slots and five blocks, so that they are used again at small lengths."""
    if not GPU:
        monkeypatch.setattr(forward, "SLOTS", {64: 2})
        monkeypatch.setattr(backward, "SLOTS", {64: 2})
        monkeypatch.setattr(block, "processors", lambda: 5)


def inputs(length, heads, kv_heads, width, dtype=jnp.bfloat16):
    draw, sizes = np.random.default_rng(0), dict(q=heads, k=kv_heads, v=kv_heads, do=heads)
    return {name: jnp.asarray(draw.normal(size=(2, length, n, width)), dtype) for name, n in sizes.items()}


def results(options, implementation, compile=True):
    """A function of q, k, v and do: o, and the gradients of q, k and v."""

    def run(q, k, v, do):
        o, pull = jax.vjp(functools.partial(attention, **options, implementation=implementation), q, k, v)
        return dict(zip(("o", "q", "k", "v"), (o, *pull(do)), strict=True))

    return jax.jit(run) if compile else run


def wanted(args, options):
    with jax.enable_x64(True):
        double = {name: np.asarray(x, np.float64) for name, x in args.items()}
        return results(options, "reference")(**double)


def assert_near(got, want, where=slice(None)):
    """Norms of the difference, also where the gradient is next to nothing, as for a query that sees one key."""
    for name, x in got.items():
        x, y = (np.asarray(z, np.float64)[where] for z in (x, want[name]))
        error, size = np.linalg.norm(x - y), np.linalg.norm(y)
        assert error <= ROUNDINGS * size + 1e-6 * x.size**0.5, f"{name}: {error:.2e} of {size:.2e}"


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *(ON_GPU if GPU else ())])
def test_equals_float64_reference(interpreter, case):
    shape, options = (CASES | ON_GPU)[case]
    args, run = inputs(*shape), results(options, "mosaic_gpu")
    got, want = run(**args), wanted(args, options)
    assert all(x.dtype == jnp.bfloat16 for x in got.values())
    assert_near(got, want)
    if (ids := options.get("segment_ids")) is not None:  # infinity and NaN in a document reach no other
        bad = ids == ids[0, shape[0] // 2]
        poison = np.where(bad & some(shape[0], 0.3), np.array([[np.nan], [np.inf]]), 0)[..., None, None]
        got = run(**{name: x + poison.astype(x.dtype) for name, x in args.items()})
        assert_near(got, want, where=~bad)
        assert not all(np.isfinite(np.asarray(x, np.float32)[bad]).all() for x in got.values())


@pytest.mark.skipif(not GPU, reason="it takes a minute in the interpreter")
def test_float16_and_vmap():
    args, options = inputs(200, 2, 1, 64, jnp.float16), dict(window=70)
    rows = {name: x[:, None] for name, x in args.items()}
    got = jax.vmap(lambda args: results(options, "mosaic_gpu", compile=False)(**args))(rows)
    assert_near({name: x[:, 0] for name, x in got.items()}, wanted(args, options))


@pytest.mark.skipif(not GPU, reason="the interpreter has one order")
def test_deterministic():
    args, run = inputs(1000, 4, 2, 64), results(dict(segment_ids=packed(1000)), "mosaic_gpu")
    first = run(**args)
    for _ in range(3):
        assert all(np.array_equal(x, y) for x, y in zip(first.values(), run(**args).values(), strict=True))


MASKS = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "window": Mask(window=150),
    "sinks": Mask(window=50, sinks=90),
    "window, not causal": Mask(causal=False, window=30),
    "strided": Mask(pattern=Strided(2, 64)),
    "fixed in a window": Mask(pattern=Fixed(2, 1, 64), window=210),
    "BigBird": Mask(pattern=BigBird(1, 1, 1, 128), causal=False),
}


@pytest.mark.parametrize("columns, by_keys", [(64, False), (128, True)])
@pytest.mark.parametrize("name", MASKS)
def test_tables_hold_what_is_seen(name, columns, by_keys):
    """Each pair that sees each other is in a visited tile, once, and tiles without a mask are seen as a whole."""
    mask, length = MASKS[name], 512
    mixed = np.random.default_rng(0).integers(0, 3, (2, length), np.int32)
    row = packed(length)
    for packing, positions in ((None, None), (row, None), (mixed, None), (None, within(row)), (mixed, within(row))):
        seen = visible((length, length), mask, Tokens(positions=positions))
        rows = 1 if positions is None else len(positions)
        by_position = np.broadcast_to(True if seen is None else seen, (rows, length, length))
        ids, seen = None, by_position
        if packing is not None:
            nobody = np.full((2, 1), 99, np.int32)
            ids = Documents(packing, np.where(some(length, 0.9), packing, nobody), nobody)
            seen = seen & (ids.queries[:, :, None] == ids.keys[:, None])
        tiles = [tiled(x.swapaxes(1, 2) if by_keys else x, columns) for x in (seen, by_position)]
        order, span = map(np.asarray, visits(mask, Given(ids, positions), length, columns, by_keys=by_keys))
        assert order.dtype == span.dtype == np.int32 and len(order) == len(seen)
        for b, n in np.ndindex(order.shape[:2]):
            (pairs, by_place), entries = (x[min(b, len(x) - 1), n] for x in tiles), order[b, n, slice(*span[b, n])]
            visited, masked = entries >> 5, (entries & 16) > 0
            assert (np.diff(visited) > 0).all() and not pairs[np.setdiff1d(np.arange(len(pairs)), visited)].any()
            assert pairs[visited[~masked]].all()
            if positions is not None:
                continue
            if ids is None:  # then nothing is visited or masked in vain
                assert pairs[visited].any((1, 2)).all() and not pairs[visited[masked]].all((1, 2)).any()
            if mask.pattern is not None:  # a quarter without its bit has no pair; one with it has, without a window
                bits = entries[:, None, None] >> (2 * np.arange(2)[:, None] + np.arange(columns // 64)) & 1 > 0
                some_pair = by_place[visited].reshape(-1, 2, 64, columns // 64, 64).any((2, 4))
                assert not (some_pair & ~bits).any()
                assert mask.causal or (some_pair == bits).all()


def tiled(seen, columns):
    """[B, T, T] as [B, N, M, 128, columns]."""
    seen = seen.reshape(len(seen), seen.shape[1] // ROWS, ROWS, -1, columns)
    return np.moveaxis(seen, 3, 2)


def test_documents_leave_out_tiles():
    """Of documents of 128 tokens each, a tile of queries visits its own one."""
    ids = np.repeat(np.arange(16, dtype=np.int32), ROWS)[None]
    order, span = map(np.asarray, visits(Mask(causal=False), Given(Documents(ids, ids)), len(ids[0]), ROWS))
    assert (span[..., 1] - span[..., 0] == 1).all()
    np.testing.assert_array_equal(np.take_along_axis(order, span[..., :1], 2)[..., 0], [np.arange(16) * 32 + 15])
    nobody = Documents(ids, np.full_like(ids, 99), np.full((1, 1), 99, np.int32))
    span = np.asarray(visits(Mask(), Given(nobody), len(ids[0]), ROWS).span)
    assert (span[..., 1] == span[..., 0]).all()


@pytest.mark.parametrize("rows, tiles", [(1, 1), (128, 16), (16, 256), (9, 30)])
def test_blocks_share_all_tiles(rows, tiles):
    """Each tile once, and nearly the same work for each block, if each has several tiles."""
    places = Places.of(rows, 1, np.arange(tiles, 0, -1), most=132, fewer=False)
    visits, taken = [], []
    for number in range(places.blocks):
        n = np.arange(int(places.mine(jnp.int32(number))))
        b, h, tile = (np.broadcast_to(x, n.shape) for x in places.place(number, n))
        visits.append((tiles - tile).sum())
        taken += list(zip(b, h, tile, strict=True))
    assert len(set(taken)) == len(taken) == rows * tiles
    assert max(visits) == places.longest(np.arange(tiles, 0, -1))
    assert rows * tiles < 1000 or max(visits) < 1.06 * np.mean(visits)


def test_no_documents_where_none_are_needed():
    find = functools.partial(given_of, shape=(2, 5), whole=8)
    assert find(Tokens(), causal=True) == given_of(Tokens(), (2, 8), 8, causal=False) == (None, None)
    found = find(Tokens(), causal=False).documents
    np.testing.assert_array_equal(found.keys[0], [0] * 5 + [1] * 3)
    placed = find(Tokens(positions=jnp.zeros((2, 5), jnp.int32)), causal=True)  # the last query would see the padding
    np.testing.assert_array_equal(placed.documents.keys, found.keys)


@pytest.mark.parametrize("ids", [[0, 1, 1, 3, 4], [LOWEST, LOWEST, 0, 2**31 - 1, 1], [4, 3, 2, 1, 0]])
def test_no_query_has_the_number_of_hidden_keys(ids):
    ids, real = np.array([ids], np.int32), np.array([[1, 0, 1, 1, 0]], bool)
    tokens = Tokens(segment_ids=jnp.asarray(ids), key_mask=jnp.asarray(real))
    (queries, keys, nobody), _ = given_of(tokens, (1, 5), 8, causal=True)
    np.testing.assert_array_equal(keys, [[*np.where(real, ids, nobody)[0], *np.repeat(nobody, 3)]])
    assert nobody not in np.asarray(queries)


def test_reasons(gpu_interpreter):
    facts = dict(dtype="bfloat16", queries=8, keys=8, width=64)
    assert mosaic_gpu.supports("cuda", **facts, named=True) is None
    assert mosaic_gpu.supports("cuda", **facts, masked=True, placed=True, window=3, sinks=1, block=512) is None
    for change, reason in (
        (dict(dtype="float32"), "float32"),
        (dict(width=96), "96 channels; it takes 64 and 128"),
        (dict(keys=9), "no caches"),
        (dict(other_places=True), "at the same positions: no caches"),
        (dict(queries=2**18, keys=2**18), "T is 262144"),
        (dict(biased=True), "no biases"),
        (dict(capped=True), "caps of scores"),
        (dict(block=96), "multiples of 64"),
        (dict(scale=-1.0), "scale is -1.0"),
    ):
        assert reason in mosaic_gpu.supports("cuda", **{**facts, **change})
    args = inputs(8, 2, 1, 64)
    del args["do"]
    with pytest.raises(UnsupportedError, match="blocks of 1 tokens"):
        attention(**args, pattern=Strided(2), implementation="mosaic_gpu")
    with pytest.raises(UnsupportedError, match="no caches"):
        places = dict.fromkeys(("positions", "key_positions"), np.zeros((2, 8), np.int32))
        attention(**args, **places, implementation="mosaic_gpu")


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_needs_a_gpu():
    assert "needs an NVIDIA GPU" in mosaic_gpu.supports("cpu")


def test_is_chosen_where_it_leaves_out_tiles():
    """And not where cuDNN was as fast."""
    facts = dict(dtype="bfloat16", queries=2048, keys=2048, width=64)
    placed = dict(masked=True, placed=True, block=64)  # a pattern in documents, as a window with padding
    for change in (dict(masked=True), dict(window=512), dict(pattern=True, block=512), placed):
        assert op.choose("cuda", **facts, **change)[0] == "mosaic_gpu"
        assert op.choose("cuda", **facts | dict(width=128), **change)[0] == "mosaic_gpu"
        assert op.choose("cpu", **facts, **change)[0] == "xla"
    assert op.choose("cuda", **facts)[0] != "mosaic_gpu"
    assert "cuDNN is as fast" in op.choose("cuda", **facts)[1]


@pytest.mark.skipif(needs_cuda_plugin.args[0] is False, reason="it is compiled, see test_compiles_into_registers")
def test_lowers_for_cuda():
    """By jax 0.10, which has no interpreter."""
    args = inputs(300, 2, 1, 64)

    def gradients(q, k, v, do, ids):
        options = op.Options(Mask(window=100, pattern=BigBird()), 0.1)
        tokens = Tokens(segment_ids=ids, positions=ids)
        attend = lambda *a: mosaic_gpu.attention(op.Inputs(*a), tokens, options)  # noqa: E731
        o, pull = jax.vjp(attend, q, k, v)
        return o, pull(do)

    traced = jax.jit(gradients).trace(*args.values(), jnp.asarray(packed(300)))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu_v2") >= 3


@needs_cuda_plugin
@pytest.mark.slow
@pytest.mark.parametrize("shape", ["8x2020x4x2x64", "8x2048x4x2x128"])
def test_compiles_into_registers(shape):
    """The interpreter takes what the compiler refuses. A thread spills at most 16 registers, of 240."""
    shared, spilled = assembled("attention", shape, "bfloat16", 1)
    assert len(spilled) == 3 and max(spilled) <= 64 and all(n < SHARED_MEMORY for n in shared)
