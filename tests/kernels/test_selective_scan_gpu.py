"""The GPU kernels of the selective scan: their numbers in Pallas's GPU interpreter, their compilation ahead of time.

The interpreter compiles each warpgroup's program anew for every shape, some ten seconds for a gradient, and runs it
block by block; so one small shape, with several chunks, several blocks of channels and padding on every axis, serves
most tests.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.interpreter import interpret
from seqmodels.kernels.selective_scan import mosaic_gpu, selective_scan
from seqmodels.kernels.selective_scan.mosaic_gpu import few, forward_plan, summary, tuning
from seqmodels.kernels.selective_scan.mosaic_gpu.stage import MARKED, SHARED
from seqmodels.kernels.selective_scan.mosaic_gpu.tile import SIZES
from tests.kernels.helpers import (
    SHARED_MEMORY,
    assembled,
    assert_close,
    assert_finite,
    compiled,
    documents,
    expected,
    in_two_calls,
    needs_cuda_plugin,
    poisoned,
    stacked,
    value_and_gradients,
)
from tests.kernels.inputs import selective_scan_inputs as inputs
from tests.kernels.isolation import check_isolation

SHAPE = dict(length=21, groups=2, width=20, state=9)
WIDE = SHAPE | dict(batch=1, width=130)

run = functools.partial(value_and_gradients, selective_scan, implementation="mosaic_gpu")


def assert_equals_reference(args, static, options=None, patched=""):
    got = run(args, static, options=options, patched=patched)
    assert_close(got, expected(selective_scan, args, static, options), 1e-5)


def test_equals_float64_reference(gpu_interpreter, monkeypatch):
    """Two groups with weights, packed and padded, T, E and N odd; wide blocks, two of them. Others run narrow ones."""
    monkeypatch.setattr(tuning, "FORWARD", {128: 1})
    assert_equals_reference(inputs(**WIDE), documents(batch=1, length=21), patched="wide blocks")


@pytest.mark.slow
def test_time_in_pieces(gpu_interpreter, monkeypatch):
    """Too few channels for the GPU: forwards in two pieces, backwards in four."""
    monkeypatch.setattr(tuning, "plan_forward", lambda *shape: (128, 2))
    monkeypatch.setattr(tuning, "plan_backward", lambda *shape: 4)
    args, static = inputs(batch=1, length=37, groups=1, width=5), documents(batch=1, length=37)
    assert_equals_reference(args, static, patched="in pieces")


def test_extreme_decays(gpu_interpreter):
    """Every second channel forgets all at once. The others have A so near 0 that only the reset itself forgets."""
    args = inputs(**SHAPE)
    args["A"] = args["A"] * np.where(np.arange(SHAPE["width"]) % 2, 1e3, 1e-35).astype(np.float32)[:, None]
    got = run(args, documents(length=21))
    assert_finite(got)
    assert_close(got, expected(selective_scan, args, documents(length=21)), 1e-5)


@pytest.mark.parametrize("length", [6, pytest.param(37, marks=pytest.mark.slow)])
def test_isolation(gpu_interpreter, monkeypatch, length):
    """A few tokens; and pieces of time, two forwards and four backwards."""
    names, shape = ("u", "dt", "B", "C", "z", "weights"), dict(groups=2, width=32, state=16)
    if length == 37:
        monkeypatch.setattr(tuning, "plan_forward", lambda *shape: (128, 2))
        monkeypatch.setattr(tuning, "plan_backward", lambda *shape: 4)
        names, shape = names[:-1], dict(groups=1, width=5)
    operation = functools.partial(selective_scan, implementation="mosaic_gpu")
    check_isolation(operation, inputs(length=length, **shape), names, 1e-5)


def test_poisoned_padding_never_leaks(gpu_interpreter):
    args, static = inputs(**SHAPE), documents(length=21)
    hidden = poisoned(args, static["mask"], ("u", "dt", "B", "C", "z"))
    assert_close(run(hidden, static), expected(selective_scan, args, static), 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_low_precision(gpu_interpreter, dtype):
    args = inputs(batch=1, length=40, groups=1, width=5)
    low = ("u", "dt", "B", "C", "z")
    half = {k: jnp.asarray(v, dtype if k in low else jnp.float32) for k, v in args.items()}
    (y, state), gradients = run(half, {})
    assert y.dtype == dtype and state.dtype == jnp.float32
    assert {k: v.dtype for k, v in gradients.items()} == {k: v.dtype for k, v in half.items()}
    (want, want_state), want_gradients = expected(selective_scan, half, {})  # the same rounded inputs
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=3e-2, atol=5e-2)  # mamba-ssm's own test
    np.testing.assert_allclose(state, want_state, rtol=1e-4, atol=1e-4)
    assert_close(gradients, want_gradients, 1e-2)


OPTIONS = {
    "step given": (dict(batch=1, length=33, width=3, state=2), (), dict(dt_softplus=False)),
    "bare": (dict(batch=1, length=5, width=3, state=1), ("D", "z", "dt_bias"), {}),
    "shared weights": (dict(batch=1, length=18, groups=3, width=4), (), {}),
    "no weights": (dict(batch=1, length=18, groups=3, width=4), ("weights",), {}),
    "five groups": (dict(batch=1, length=18, groups=5, width=4), (), {}),
    "64 states": (dict(batch=1, length=17, width=3, state=64), (), {}),
    "no group axis": (dict(batch=1, length=19, groups=0, width=3, state=3), ("D",), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OPTIONS)
def test_options(gpu_interpreter, case):
    shape, without, static = OPTIONS[case]
    args = {k: v for k, v in inputs(**shape).items() if k not in without}
    if case == "shared weights":
        args["weights"] = args["weights"][:, :, :1]
    if not static.get("dt_softplus", True):
        args = args | dict(dt=np.abs(args["dt"]), dt_bias=np.abs(args["dt_bias"]))
    assert_equals_reference(args, {}, static)


# batch, T, groups, width, states, documents. The last but one has 16 threads a channel.
FEW = [(2, 1, 0, 64, 4, False), (2, 3, 2, 32, 16, True), (1, 2, 1, 32, 64, False), (4, 8, 3, 16, 8, True)]


@pytest.mark.parametrize("case", FEW)
def test_few_tokens(gpu_interpreter, case):
    """As in decoding, by the kernel that updates the state in place."""
    batch, length, groups, width, state, packed = case
    assert few.supports((batch, length, max(groups, 1), width, state)) is None
    layout = documents(batch=batch, length=length) if packed else {}
    assert_equals_reference(inputs(batch, length, groups, width, state), layout)


def test_few_tokens_without_options(gpu_interpreter):
    args = {k: v for k, v in inputs(2, 2, 0, 64, 4).items() if k not in ("D", "z", "dt_bias")}
    assert_equals_reference(args | dict(dt=np.abs(args["dt"])), {}, dict(dt_softplus=False))


def test_few_tokens_in_place():
    """As lowered for a GPU: the state's operand is an output, and XLA may donate it to that."""
    args = {k: jnp.asarray(v) for k, v in inputs(2, 1, 2, 64, 16).items()}
    layout = dict(segment_ids=None, initial_segment=None, mask=None)
    state = args.pop("initial_state")

    def step(state, args):
        return mosaic_gpu.few_tokens(args | dict(initial_state=state), layout, True)

    lowered = jax.jit(step, donate_argnums=0).trace(state, args).lower(lowering_platforms=("cuda",)).as_text()
    (alias,) = re.findall(r"output_operand_alias<(.*)>", lowered)
    assert f"operand_index = {len(args)}" in alias
    several = stacked([(state, args)] * 2)
    jax.jit(jax.vmap(step)).trace(*several).lower(lowering_platforms=("cuda",))


@pytest.mark.slow
def test_state_carries_over(gpu_interpreter):
    args, static = inputs(batch=1, length=36, width=3), documents(batch=1, length=36, padded=False)
    scan = compiled(selective_scan, "mosaic_gpu")
    assert_close(in_two_calls(scan, args, static, 18, ("u", "dt", "B", "C", "z")), scan(**args, **static), 1e-6)


def test_no_races(gpu_interpreter, monkeypatch):
    """No warpgroup reads or writes what another may be writing; in one block, for writes are of whole arrays.

    Forwards three chunks take turns in two places, backwards five in three.
    """
    if jax.default_backend() == "gpu":
        pytest.skip("a GPU does not report races")
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    args = inputs(batch=1, length=40, width=5, state=9)
    for module, constant, value in (
        (tuning, "FORWARD", {64: 1}),
        (tuning, "WIDEST", 64),
        (forward_plan, "MOST", 2),
        (forward_plan, "FEWEST", 2),
    ):
        monkeypatch.setattr(module, constant, value)
    with interpret(detect_races=True):
        assert_equals_reference(args, {})
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("states", SIZES)
def test_fits_in_shared_memory(states, groups, dtype):
    """The chunks that are chosen, with everything that a call may have."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    arrays = dict(
        u=shape((1, 4096, groups, 256)),
        dt=shape((1, 4096, groups, 256)),
        A=jax.ShapeDtypeStruct((groups, 256, states), np.float32),
        B=jax.ShapeDtypeStruct((1, 4096, groups, states), np.float32),
        C=jax.ShapeDtypeStruct((1, 4096, groups, states), np.float32),
        z=shape((1, 4096, 256)),
        weights=shape((1, 4096, groups - 1, 256)) if groups > 1 else None,
    )
    assert mosaic_gpu.forward_chunks(arrays)
    inputs = {name: arrays[name] for name in ("u", "dt", "B", "C", "z", "weights")}
    chunk = mosaic_gpu.backward_chunk(arrays)
    assert mosaic_gpu.backward_bytes(**inputs, states=states, chunk=chunk) <= SHARED
    reverse = dict(dt=inputs["dt"], B=inputs["C"], dy=inputs["z"], z=inputs["z"], weights=inputs["weights"])
    for read in (reverse, {name: inputs[name] for name in ("u", "dt", "B")}):
        stage = summary.staged(read | dict(marks=MARKED))
        assert summary.summary_bytes(stage) <= SHARED


@pytest.mark.slow
def test_vmap(gpu_interpreter):
    args = [inputs(batch=1, length=18, width=3, seed=seed) for seed in (0, 1)]
    want = stacked([expected(selective_scan, a, {}) for a in args])
    assert_close(jax.vmap(lambda a: run(a, {}))(stacked(args)), want, 1e-5)


def test_reasons():
    facts = dict(shape=(1, 32, 1, 4, 2), dtype=np.dtype("float32"))
    assert "needs an NVIDIA GPU" in mosaic_gpu.supports(platform="cpu", **facts)
    assert "float64" in mosaic_gpu.supports(platform="cuda", **facts | dict(dtype=np.dtype("float64")))
    assert "N is 65" in mosaic_gpu.supports(platform="cuda", **facts | dict(shape=(1, 32, 1, 4, 65)))
    assert "6 groups" in mosaic_gpu.supports(platform="cuda", **facts | dict(shape=(1, 32, 6, 4, 2)))
    if jax.default_backend() != "gpu":
        with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU"):
            selective_scan(**inputs(), implementation="mosaic_gpu")


# shape, groups, dtype, documents. The first ones are those that models train with.
MAIN = [
    ("8x2048x2048x16", 1, "bfloat16", 1),
    ("8x2048x2048x16", 1, "float32", 0),
    ("2x8192x2048x16", 1, "bfloat16", 0),
    ("1x65536x1536x16", 1, "bfloat16", 1),
]
ODD = [
    ("2x150x130x9", 2, "float16", 1),
    ("1x40x3x1", 1, "float32", 0),
    ("2x1000x384x32", 2, "bfloat16", 1),
    ("2x64x256x64", 1, "bfloat16", 0),
    ("2x64x256x64", 4, "float32", 1),
    ("8x2048x2048x16", 3, "bfloat16", 1),
]


@needs_cuda_plugin
@pytest.mark.parametrize("case", [MAIN[0], *(pytest.param(c, marks=pytest.mark.slow) for c in MAIN[1:])])
def test_compiles_without_spills(case):
    shared, spilled = assembled("selective_scan", *case)
    assert len(spilled) >= 2 and not any(spilled)
    assert max(shared, default=0) <= SHARED_MEMORY


@needs_cuda_plugin
@pytest.mark.parametrize("case", [("64x2x2048x16", 1, "bfloat16", 0), ("2x8x1024x64", 3, "float32", 1)])
def test_a_few_tokens_compile_in_place(case):
    """The donated state is read and written by one kernel, and never copied."""
    _, spilled = assembled("selective_scan", *case)
    assert spilled == [0]


@needs_cuda_plugin
@pytest.mark.slow
@pytest.mark.parametrize("case", ODD)
def test_odd_shapes_compile(case):
    """The interpreter takes what the compiler refuses."""
    shared, spilled = assembled("selective_scan", *case)
    assert len(spilled) >= 2 and max(shared, default=0) <= SHARED_MEMORY
