"""Every implementation of attention against the float64 reference, and that against a loop over queries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels.attention import attention, cudnn, strips, xla
from seqmodels.kernels.dispatch import UnsupportedError
from tests.kernels.attention_cases import (
    BATCH,
    CASES,
    DOCUMENTS,
    GRADIENTS,
    HEADS,
    KEYS,
    POSITIONS,
    QUERIES,
    by_hand,
    inputs,
    random,
)
from tests.kernels.helpers import assert_close

BACKENDS = ["xla"]  # those that take everything; cuDNN takes a part of it, on a GPU only


@pytest.fixture(params=[256, 2], ids=["one tile", "tiles"])
def tile(request, monkeypatch):
    """Tokens per tile: one tile has all scores, or many have."""
    monkeypatch.setitem(xla.TILE, jax.default_backend(), request.param)
    return request.param


def value_and_gradients(args, options, implementation):
    """o, and the gradients of a functional of it, also those of weights and gates among the options."""
    args = args | {name: options[name] for name in GRADIENTS if name in options}

    def output(args):
        return attention(**options | args, implementation=implementation)

    def functional(args):
        o = output(args)
        return jnp.sum(o * jnp.asarray(np.random.default_rng(7).normal(size=o.shape), o.dtype)), o

    with jax.default_matmul_precision("highest"):  # a GPU rounds float32 to 11 bits else
        gradients, o = jax.jit(jax.grad(functional, has_aux=True))(args)
    return o, gradients


def double(tree):
    """Numbers of arguments and options as float64."""
    return {
        k: np.asarray(x, np.float64) if isinstance(x, np.ndarray) and x.dtype == np.float32 else x
        for k, x in tree.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_definition(case):
    keys, options = CASES[case]
    args = inputs(keys, dtype=np.float64)
    with jax.enable_x64(True):
        got = attention(**args, **double(options), implementation="reference")
    assert_close(got, by_hand(**args, **double(options)), 1e-14)


@functools.cache
def expected(case):
    keys, options = CASES[case]
    with jax.enable_x64(True):
        return value_and_gradients(inputs(keys, dtype=np.float64), double(options), "reference")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_equals_float64_reference(implementation, case, tile):
    keys, options = CASES[case]
    want = expected(case)
    # In tiles a gradient of scores is weight (dweight - o do), where o is rounded: see `xla.backward`.
    assert_close(value_and_gradients(inputs(keys), options, implementation), want, 2e-6 if tile > 2 else 5e-6)


@pytest.mark.parametrize("padded", [False, True], ids=["documents in a window", "padding"])
def test_strips(padded, monkeypatch):
    """More queries than a strip, of which the last strip is not full; padding hides keys, and queries see none."""
    monkeypatch.setattr(strips, "STRIP", 2)
    options = dict(window=4, segment_ids=DOCUMENTS)
    if padded:
        hidden = np.arange(QUERIES) == 1
        documents = dict(segment_ids=np.where(hidden, -2, DOCUMENTS), key_segment_ids=np.where(hidden, -1, DOCUMENTS))
        options = dict(causal=False, **{name: ids.astype(np.int32) for name, ids in documents.items()})
    with jax.enable_x64(True):
        want = value_and_gradients(inputs(dtype=np.float64), options, "reference")
    assert_close(value_and_gradients(inputs(), options, "strips"), want, 5e-6)
    positions = np.broadcast_to(np.arange(QUERIES, dtype=np.int32), DOCUMENTS.shape)
    args = inputs()
    with pytest.raises(UnsupportedError, match="not the tokens of the same rows"):
        attention(args["q"], args["k"], args["v"], positions=positions, implementation="strips")


@pytest.mark.parametrize("kv_heads", [1, HEADS])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_one_key_head_for_all_and_one_each(implementation, kv_heads):
    with jax.enable_x64(True):
        want = value_and_gradients(inputs(kv_heads=kv_heads, dtype=np.float64), {}, "reference")
    assert_close(value_and_gradients(inputs(kv_heads=kv_heads), {}, implementation), want, 2e-6)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("case", ["causal", "cache of documents in a window"])
def test_bfloat16(implementation, case):
    keys, options = CASES[case]
    half = {name: jnp.asarray(value, jnp.bfloat16) for name, value in inputs(keys).items()}
    o, gradients = value_and_gradients(half, options, implementation)
    wide = {name: value.astype(jnp.float32) for name, value in half.items()}
    want, want_gradients = value_and_gradients(wide, options, "reference")
    assert o.dtype == jnp.bfloat16
    assert_close(o, want, 2**-7)  # weights and result are rounded to 8 bits
    assert_close(gradients, want_gradients, 2**-6)


@pytest.mark.parametrize("implementation", ["reference", *BACKENDS])
@pytest.mark.parametrize("case", ["ring", "cache of documents in a window"])
def test_order_of_keys_does_not_matter(implementation, case):
    """Slots in another order, with their positions and documents, give the same output and the same gradients."""
    keys, options = CASES[case]
    args, order = inputs(keys), np.random.default_rng(2).permutation(keys)
    shuffled = {name: x if name == "q" else x[:, order] for name, x in args.items()}
    moved = {name: x[:, order] if name.startswith("key_") else x for name, x in options.items()}
    want, gradients = value_and_gradients(args, options, implementation)
    got, got_gradients = value_and_gradients(shuffled, moved, implementation)
    assert_close(got, want, 1e-6)
    assert_close(got_gradients, {name: x if name == "q" else x[:, order] for name, x in gradients.items()}, 1e-6)


@pytest.mark.parametrize("implementation", ["reference", *BACKENDS])
def test_poisoned_keys_never_leak(implementation):
    keys, options = CASES["cache of documents in a window"]
    args = inputs(keys)
    seen = options["key_mask"][..., None, None]
    poisoned = {**args, "k": np.where(seen, args["k"], np.nan), "v": np.where(seen, args["v"], np.nan)}
    want = value_and_gradients(args, options, implementation)
    assert_close(value_and_gradients(poisoned, options, implementation), want, 1e-7)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_large_scores_are_finite(implementation):
    args = {name: value * 1e3 for name, value in inputs().items()}
    with jax.enable_x64(True):
        want = value_and_gradients({n: v.astype(np.float64) for n, v in args.items()}, {}, "reference")[0]
    got, gradients = value_and_gradients(args, {}, implementation)
    assert_close(got, want, 1e-6)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize("implementation", ["reference", *BACKENDS])
def test_vmap(implementation):
    args = [inputs(seed=seed) for seed in (0, 1)]
    f = functools.partial(value_and_gradients, options=CASES["key mask"][1], implementation=implementation)
    stacked, want = (jax.tree.map(lambda *x: jnp.stack(x), *trees) for trees in (args, [f(a) for a in args]))
    assert_close(jax.vmap(f)(stacked), want, 1e-6)


ON_CUDNN = {
    "causal": {},
    "window": dict(window=20),
    "full": dict(causal=False, scale=0.2),
    "packed": dict(segment_ids=np.sort(random((2, 64), 5), axis=1)),
    "key mask": dict(key_mask=random((2, 64), 3) > 1),  # the first queries see nothing
    "cache": dict(
        positions=np.arange(64, dtype=np.int32) // 2 + np.array([[0], [30]], np.int32),
        key_positions=np.broadcast_to(np.arange(64, dtype=np.int32), (2, 64)),
        window=9,
    ),
    "ring": dict(
        positions=np.arange(64, dtype=np.int32) + np.array([[100], [90]], np.int32),
        key_positions=np.roll(np.arange(64, dtype=np.int32) + np.array([[80], [85]], np.int32), 17, axis=1),
        key_mask=random((2, 64), 5) > 0,
        window=30,
    ),
}


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
@pytest.mark.parametrize("case", ON_CUDNN)
def test_cudnn(case):
    draw = np.random.default_rng(0)
    half = {
        name: jnp.asarray(draw.normal(size=(2, 64, heads, 64)), jnp.bfloat16)
        for name, heads in (("q", 4), ("k", 2), ("v", 2))
    }
    o, gradients = value_and_gradients(half, ON_CUDNN[case], "cudnn")
    wide = {name: value.astype(jnp.float32) for name, value in half.items()}
    want, want_gradients = value_and_gradients(wide, ON_CUDNN[case], "reference")
    assert o.dtype == jnp.bfloat16
    assert_close(o, want, 2**-7)
    assert_close(gradients, want_gradients, 2**-6)


def test_cudnn_says_why_not(monkeypatch):
    facts = dict(dtype="bfloat16", queries=8, keys=8, width=64, causal=True, masked=False, window=None)
    if jax.default_backend() == "cpu":
        assert "needs an NVIDIA GPU" in cudnn.supports("cuda", **facts)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert cudnn.supports("cuda", **facts) is None
    for platform, change, reason in (
        ("tpu", {}, "GPU"),
        ("cuda", dict(dtype="float32"), "float32"),
        ("cuda", dict(width=100), "100"),
        ("cuda", dict(causal=False, window=4), "window"),
        ("cuda", dict(masked=True, keys=7), "8 and 7"),
        ("cuda", dict(sinks=2, keys=7), "8 and 7"),
        ("cuda", dict(masked=True, queries=32768, keys=32768), "32768 x 32768 scores"),
        ("cuda", dict(pattern=True), "sparse pattern"),
        ("cuda", dict(biased=True), "no biases, gates or caps"),
    ):
        assert reason in cudnn.supports(platform, **{**facts, **change})
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert "jax 0.11" in cudnn.supports("cuda", **{**facts, "masked": True})


def test_bad_arguments_are_named():
    args = inputs()
    with pytest.raises(UnsupportedError, match=r"'flash'.*reference, xla"):
        attention(**args, implementation="flash")
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        attention(args["q"][:, :, :3], args["k"], args["v"])
    with pytest.raises(ValueError, match="key_mask must be"):
        attention(**args, key_mask=np.ones((BATCH, KEYS), bool))
    with pytest.raises(ValueError, match="window must be 1 or more, got 0"):
        attention(**args, window=0)
    with pytest.raises(ValueError, match="without segment_ids"):
        attention(**args, key_segment_ids=np.zeros((BATCH, QUERIES), np.int32))
    with pytest.raises(ValueError, match="key_positions were given without positions"):
        attention(**args, key_positions=np.zeros((BATCH, QUERIES), np.int32))
    with pytest.raises(ValueError, match=r"key_positions must be \(2, 8\), got \(2, 5\)"):
        attention(**inputs(KEYS), positions=POSITIONS)
