"""The TPU kernels of the selective scan: their numbers in Pallas's TPU interpreter, their compilation ahead of time.

One small shape, with several chunks, several blocks of channels and padding on every axis, serves most tests, so that
it is compiled once.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.interpreter import interpret
from seqmodels.kernels.selective_scan import mosaic_tpu, selective_scan
from tests.kernels.helpers import (
    assert_close,
    assert_finite,
    compiled,
    documents,
    expected,
    in_two_calls,
    needs_libtpu,
    poisoned,
    random_documents,
    stacked,
    value_and_gradients,
)
from tests.kernels.inputs import selective_scan_inputs as inputs
from tests.kernels.isolation import check_isolation

ROOT = Path(__file__).resolve().parents[2]
SHAPE = dict(batch=1, length=21, groups=2, width=130, state=9)
LAYOUT = documents(batch=1, length=21)


@pytest.fixture
def interpreter(tpu_interpreter, monkeypatch):
    """Chunks of 16 tokens and blocks of 128 channels."""
    monkeypatch.setattr(mosaic_tpu, "TOKENS", 16)
    monkeypatch.setattr(mosaic_tpu, "WIDTH", 128)


run = functools.partial(value_and_gradients, selective_scan, implementation="mosaic_tpu")


def assert_equals_reference(args, static, options=None):
    assert_close(run(args, static, options=options), expected(selective_scan, args, static, options), 1e-5)


def test_equals_float64_reference(interpreter):
    assert_equals_reference(inputs(**SHAPE), LAYOUT)


def test_extreme_decays(interpreter):
    """Every second channel forgets all at once. The others have A so near 0 that only the reset itself forgets."""
    args = inputs(**SHAPE)
    args["A"] = args["A"] * np.where(np.arange(SHAPE["width"]) % 2, 1e3, 1e-35).astype(np.float32)[:, None]
    got = run(args, LAYOUT)
    assert_finite(got)
    assert_close(got, expected(selective_scan, args, LAYOUT), 1e-5)


def test_isolation(interpreter):
    """What is not finite in one document, in padding or in a dropped state reaches no other document."""
    operation = functools.partial(selective_scan, implementation="mosaic_tpu")
    check_isolation(operation, inputs(**SHAPE | dict(batch=2)), ("u", "dt", "B", "C", "z", "weights"), 1e-5)


def test_poisoned_padding_never_leaks(interpreter):
    args, static = inputs(**SHAPE), LAYOUT
    hidden = poisoned(args, static["mask"], ("u", "dt", "B", "C", "z"))
    assert_close(run(hidden, static), expected(selective_scan, args, static), 1e-5)


@pytest.mark.slow
def test_random_documents(interpreter):
    """Any change of documents, any mask, at one shape."""

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(0, 2**16), changes=st.floats(0, 1), real=st.floats(0, 1), first=st.integers(0, 2))
    def check(seed, changes, real, first):
        static = random_documents(seed, 1, 21, changes, real, first)
        assert_equals_reference(inputs(**SHAPE, seed=seed), static)

    check()


PLAIN = {
    "bare": (dict(batch=1, length=5, width=3, state=1), ("D", "z", "dt_bias"), {}),
    "step given": (dict(batch=1, length=33, width=3, state=2), (), dict(dt_softplus=False)),
}
MORE = {
    "shared weights": (dict(batch=1, length=18, groups=3, width=4), (), {}),
    "no weights": (dict(batch=1, length=18, groups=3, width=4), ("weights",), {}),
    "one token": (dict(length=1, groups=2, width=4), (), {}),
    "64 states": (dict(batch=1, length=17, width=3, state=64), (), {}),
    "no group axis": (dict(batch=1, length=3, groups=0, width=3, state=3), ("D",), {}),
}
CASES = [*PLAIN, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


@pytest.mark.parametrize("case", CASES)
def test_options(interpreter, case):
    shape, without, static = (PLAIN | MORE)[case]
    args = {k: v for k, v in inputs(**shape).items() if k not in without}
    if case == "shared weights":
        args["weights"] = args["weights"][:, :, :1]
    if not static.get("dt_softplus", True):
        args = args | dict(dt=np.abs(args["dt"]), dt_bias=np.abs(args["dt_bias"]))
    assert_equals_reference(args, {}, static)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_low_precision(interpreter, dtype):
    args = inputs(batch=1, length=40, groups=2, width=5)
    low = ("u", "dt", "B", "C", "z", "weights")
    half = {k: jnp.asarray(v, dtype if k in low else jnp.float32) for k, v in args.items()}
    (y, state), gradients = run(half, {})
    assert y.dtype == dtype and state.dtype == jnp.float32
    assert {k: v.dtype for k, v in gradients.items()} == {k: v.dtype for k, v in half.items()}
    (want, want_state), want_gradients = expected(selective_scan, half, {})  # the same rounded inputs
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=3e-2, atol=5e-2)  # mamba-ssm's own test
    np.testing.assert_allclose(state, want_state, rtol=1e-4, atol=1e-4)
    assert_close(gradients, want_gradients, 1e-2)


def test_state_carries_over(interpreter):
    args, static = inputs(batch=1, length=36, width=3), documents(batch=1, length=36, padded=False)
    scan = compiled(selective_scan, "mosaic_tpu")
    assert_close(in_two_calls(scan, args, static, 18, ("u", "dt", "B", "C", "z")), scan(**args, **static), 1e-6)


def test_no_races(interpreter):
    """Two cores share the two sequences; no core reads or writes what the other may be writing."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    with interpret(detect_races=True, num_cores_or_threads=2):
        assert_equals_reference(inputs(length=17, width=130), {})
    assert not interpret_pallas_call.races.races_found


@pytest.mark.slow
def test_vmap(interpreter):
    args = [inputs(length=3, width=3, seed=seed) for seed in (0, 1)]
    want = stacked([expected(selective_scan, a, {}) for a in args])
    assert_close(jax.vmap(lambda a: run(a, {}))(stacked(args)), want, 1e-5)


def test_reasons():
    facts = dict(shape=(1, 8, 1, 4, 2), dtype=np.dtype("float32"))
    assert mosaic_tpu.supports(platform="tpu", **facts) is None
    assert "needs a TPU" in mosaic_tpu.supports(platform="cuda", **facts)
    assert "float64" in mosaic_tpu.supports(platform="tpu", **facts | dict(dtype=np.dtype("float64")))
    assert "VMEM" in mosaic_tpu.supports(platform="tpu", **facts | dict(shape=(1, 4096, 8, 65536, 64)))
    if jax.default_backend() != "tpu":
        with pytest.raises(UnsupportedError, match="needs a TPU"):
            selective_scan(**inputs(), implementation="mosaic_tpu")


# Bundles a token, at most: a fifth above what the older compiler makes. Losing the unrolling costs more.
BUNDLES = {("full", "forward"): 135, ("full", "backward"): 330, ("read3", "forward"): 350, ("read3", "backward"): 1010}
COMPILED = [("v5e", "bfloat16", "read3")] + [
    pytest.param(chip, dtype, variant, marks=pytest.mark.slow)
    for chip in ("v5e", "v5p", "v6e")
    for dtype in ("bfloat16", "float32")
    for variant in ("full", "read3")
    if (chip, dtype, variant) != ("v5e", "bfloat16", "read3")
]


@needs_libtpu
@pytest.mark.parametrize(("chip", "dtype", "variant"), COMPILED)
def test_compiles_for_tpu(chip, dtype, variant, tmp_path):
    """Forward and gradient, to the final bundles; VMEM suffices, and is no more than `supports` reckons with."""
    command = [sys.executable, "benchmarks/tpu_aot.py", f"--chips={chip}", f"--dtypes={dtype}"]
    command += [f"--shapes=1x256x2048x16:{variant}", f"--out={tmp_path / 'out.json'}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["pass"] for row in rows] == ["forward", "backward"]
    groups = 1 if variant == "full" else 3
    estimate = mosaic_tpu.backward_vmem(256, groups, 2048, 16, np.dtype("float32").itemsize)
    for row in rows:
        assert 0 < row["vmem_bytes"] <= estimate <= mosaic_tpu.VMEM_LIMIT < row["vmem_of_core"]
        assert row["bundles_per_token"] < BUNDLES[variant, row["pass"]]


ODD = {
    "2x150x130x9": ("read2", "bfloat16"),
    "1x1x2048x16": ("full", "bfloat16"),
    "1x17x3x1": ("full", "float32"),
    "3x129x384x5": ("full", "float16"),
    "1x300x1536x64": ("read3", "bfloat16"),
}


@needs_libtpu
@pytest.mark.parametrize("sizes", ["2x150x130x9", *(pytest.param(s, marks=pytest.mark.slow) for s in list(ODD)[1:])])
def test_odd_shapes_compile(sizes):
    """The interpreter takes what the compiler refuses."""
    from benchmarks import tpu_aot

    variant, dtype = ODD[sizes]
    shape = tuple(map(int, sizes.split("x")))
    tpu_aot.compile_gradient("v5e", tpu_aot.selective_scan(shape, variant, jnp.dtype(dtype)))


@needs_libtpu
@pytest.mark.parametrize("vmap", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_without_options_compiles(vmap):
    from benchmarks import tpu_aot

    absent = dict.fromkeys(("D", "z", "dt_bias", "weights", "segment_ids", "initial_segment", "mask"))

    def gradients(args):
        return jax.grad(lambda a: mosaic_tpu.selective_scan(**a, **absent, dt_softplus=False)[0].sum())(args)

    args = inputs(batch=2, length=40, width=200, state=3)
    args = {k: v[None] if vmap else v for k, v in args.items() if k not in absent}
    sharding = tpu_aot.sharding("v6e")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    jax.jit(jax.vmap(gradients) if vmap else gradients).lower(shapes).compile()
