"""The GPU kernels of the selective scan: their numbers in Pallas's GPU interpreter, their compilation ahead of time.

The interpreter compiles each warpgroup's program anew for every shape, some ten seconds for a gradient; so one small
shape, with several chunks, several blocks of channels and padding on every axis, serves most tests.
"""

import functools
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_selective_scan import assert_close, documents, inputs

from seqmodels.kernels import lanes
from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.selective_scan import mosaic_gpu, selective_scan
from seqmodels.kernels.selective_scan.mosaic_gpu import few, summary
from seqmodels.kernels.selective_scan.mosaic_gpu.stage import MARKED, SHARED
from seqmodels.kernels.selective_scan.mosaic_gpu.tile import SIZES

HERE = Path(__file__).resolve().parent
SHAPE = dict(length=21, groups=2, width=130, state=9)
ONE_WORKER = dict(forward=("WORKERS", 1), summary=("WORKERS", 1), tile=("WORKERS", 1))


@pytest.fixture(scope="module")
def interpreter():
    """Kernels run in the interpreter, whose memory starts as NaN.

    A write is there one of the whole array, so no two warpgroups may write to one array: each channel has one worker.
    """
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("the interpreter of jax 0.10 compiles at every launch, a minute for each gradient")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "INTERPRET", plgpu.InterpretGPUParams())
        for name, (constant, value) in ONE_WORKER.items():
            patch.setattr(importlib.import_module(f"{mosaic_gpu.__name__}.{name}"), constant, value)
        jax.clear_caches()  # the kernels are jitted, and know nothing of these
        yield patch
    jax.clear_caches()


@functools.partial(jax.jit, static_argnames=("dt_softplus", "implementation"))
def value_and_gradients(args, documents, cotangents, dt_softplus=True, implementation="mosaic_gpu"):
    """y on real tokens, the final state, and what `cotangents` of both pull back to."""

    def outputs(args):
        y, state = selective_scan(**args, **documents, dt_softplus=dt_softplus, implementation=implementation)
        return (jnp.where(documents["mask"][..., None], y, 0) if "mask" in documents else y), state

    results, pull = jax.vjp(outputs, args)
    return results, pull(tuple(c.astype(r.dtype) for c, r in zip(cotangents, results, strict=True)))


def cotangents(args, seed=7):
    draw = np.random.default_rng(seed)
    shape = args["u"].shape
    return tuple(
        draw.normal(size=s).astype(np.float32) for s in ((*shape[:2], shape[-1]), (shape[0], *args["A"].shape))
    )


def expected(args, documents, **static):
    """The same by the reference in float64, from the same numbers."""
    with jax.enable_x64(True):
        double = {k: np.asarray(v, np.float64) for k, v in args.items()}
        pull = tuple(np.asarray(c, np.float64) for c in cotangents(args))
        return value_and_gradients(double, documents, pull, implementation="reference", **static)


def assert_equals_reference(args, documents, tolerance=1e-5, **static):
    got = value_and_gradients(args, documents, cotangents(args), **static)
    assert_close(got, expected(args, documents, **static), tolerance)


def test_equals_float64_reference(interpreter):
    """Two groups with weights, packed and padded, T, E and N odd; wide blocks. The other tests run narrow ones."""
    with interpreter.context() as patch:
        patch.setattr(mosaic_gpu.tuning, "FORWARD", {128: 1})
        jax.clear_caches()
        assert_equals_reference(inputs(**SHAPE), documents(length=21))


@pytest.mark.slow
def test_time_in_pieces(interpreter):
    """Too few channels for the GPU: forwards in two pieces, backwards in four."""
    with interpreter.context() as patch:
        patch.setattr(mosaic_gpu.tuning, "plan_forward", lambda *shape: (128, 2))
        patch.setattr(mosaic_gpu.tuning, "plan_backward", lambda *shape: 4)
        assert_equals_reference(inputs(batch=1, length=37, groups=1, width=5), documents(batch=1, length=37))


@pytest.mark.parametrize("scale", [1e-35, 1e3])
def test_extreme_decays(interpreter, scale):
    """Also with A so near 0 that only the reset itself can make a state forget."""
    args = inputs(**SHAPE)
    args["A"] = args["A"] * np.float32(scale)
    got = value_and_gradients(args, documents(length=21), cotangents(args))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    want = expected(args, documents(length=21))
    assert_close(got, want, 1e-5)


def test_poisoned_padding_never_leaks(interpreter):
    args, layout = inputs(**SHAPE), documents(length=21)
    hidden = {k: np.array(args[k]) for k in ("u", "dt", "B", "C", "z")}
    for x in hidden.values():
        x[~np.asarray(layout["mask"])] = np.nan
    got = value_and_gradients(args | hidden, layout, cotangents(args))
    assert_close(got, value_and_gradients(args, layout, cotangents(args)), 1e-7)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_low_precision(interpreter, dtype):
    args = inputs(batch=1, length=40, groups=1, width=5)
    low = ("u", "dt", "B", "C", "z")
    half = {k: jnp.asarray(v, dtype if k in low else jnp.float32) for k, v in args.items()}
    (y, state), gradients = value_and_gradients(half, {}, cotangents(args))
    assert y.dtype == dtype and state.dtype == jnp.float32
    assert {k: v.dtype for k, v in gradients[0].items()} == {k: v.dtype for k, v in half.items()}
    (want, want_state), want_gradients = expected(half, {})  # the same rounded inputs
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
def test_options(interpreter, case):
    shape, without, static = OPTIONS[case]
    args = {k: v for k, v in inputs(**shape).items() if k not in without}
    if case == "shared weights":
        args["weights"] = args["weights"][:, :, :1]
    if not static.get("dt_softplus", True):
        args = args | dict(dt=np.abs(args["dt"]), dt_bias=np.abs(args["dt_bias"]))
    assert_equals_reference(args, {}, **static)


# batch, T, groups, width, states, documents. The last but one has 16 threads a channel.
FEW = [(2, 1, 0, 64, 4, False), (2, 3, 2, 32, 16, True), (1, 2, 1, 32, 64, False), (4, 8, 3, 16, 8, True)]


@pytest.mark.parametrize("case", FEW)
def test_few_tokens(interpreter, case):
    """As in decoding, by the kernel that updates the state in place."""
    batch, length, groups, width, state, packed = case
    assert few.supports((batch, length, max(groups, 1), width, state)) is None
    layout = documents(batch=batch, length=length) if packed else {}
    assert_equals_reference(inputs(batch, length, groups, width, state), layout)


def test_few_tokens_without_options(interpreter):
    args = {k: v for k, v in inputs(2, 2, 0, 64, 4).items() if k not in ("D", "z", "dt_bias")}
    assert_equals_reference(args | dict(dt=np.abs(args["dt"])), {}, dt_softplus=False)


def test_few_tokens_in_place(monkeypatch):
    """As lowered for a GPU: the state's operand is an output, and XLA may donate it to that."""
    monkeypatch.setattr(lanes, "INTERPRET", None)
    jax.clear_caches()  # the kernel is jitted, and may know the interpreter
    args = {k: jnp.asarray(v) for k, v in inputs(2, 1, 2, 64, 16).items()}
    layout = dict(segment_ids=None, initial_segment=None, mask=None)
    state = args.pop("initial_state")

    def step(state, args):
        return mosaic_gpu.few_tokens(args | dict(initial_state=state), layout, True)

    lowered = jax.jit(step, donate_argnums=0).trace(state, args).lower(lowering_platforms=("cuda",)).as_text()
    (alias,) = re.findall(r"output_operand_alias<(.*)>", lowered)
    assert f"operand_index = {len(args)}" in alias
    several = jax.tree.map(lambda x: jnp.stack([x, x]), (state, args))
    jax.jit(jax.vmap(step)).trace(*several).lower(lowering_platforms=("cuda",))
    jax.clear_caches()


@pytest.mark.slow
def test_state_carries_over(interpreter):
    args, layout = inputs(batch=1, length=36, width=3), documents(batch=1, length=36, padded=False)
    scan = jax.jit(functools.partial(selective_scan, implementation="mosaic_gpu"))
    whole, final = scan(**args, **layout)
    both, time = args | layout, ("u", "dt", "B", "C", "z", "segment_ids")
    head = {k: v[:, :18] if k in time else v for k, v in both.items()}
    tail = {k: v[:, 18:] if k in time else v for k, v in both.items()}
    first, state = scan(**head)
    second, state = scan(**tail | dict(initial_state=state, initial_segment=head["segment_ids"][:, -1]))
    assert_close((jnp.concatenate([first, second], axis=1), state), (whole, final), 1e-6)


def test_no_races(interpreter):
    """No warpgroup reads or writes what another may be writing; in one block, for writes are of whole arrays.

    Forwards three chunks take turns in two places, backwards five in three.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    args = inputs(batch=1, length=40, width=5, state=9)
    with interpreter.context() as patch:
        patch.setattr(lanes, "INTERPRET", plgpu.InterpretGPUParams(detect_races=True))
        patch.setattr(mosaic_gpu.tuning, "FORWARD", {64: 1})
        patch.setattr(mosaic_gpu.tuning, "WIDEST", 64)
        kernel = importlib.import_module(f"{mosaic_gpu.__name__}.forward")
        patch.setattr(kernel, "MOST", 2)
        patch.setattr(kernel, "FEWEST", 2)
        jax.clear_caches()
        assert_equals_reference(args, {})
        assert not gpu_callbacks.get_races().races_found
    jax.clear_caches()


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
def test_vmap(interpreter):
    args = [inputs(batch=1, length=18, width=3, seed=seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *args)
    pulls = jax.tree.map(lambda *x: jnp.stack(x), *map(cotangents, args))
    got = jax.vmap(lambda a, c: value_and_gradients(a, {}, c))(stacked, pulls)
    want = jax.tree.map(lambda *x: np.stack(x), *(expected(a, {}) for a in args))
    assert_close(got, want, 1e-5)


def test_reasons(monkeypatch):
    monkeypatch.setattr(lanes, "INTERPRET", None)
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
SHARED_MEMORY = 227 * 1024  # bytes a block, of an H100


def assembled(shape, groups, dtype, documents):
    """(bytes of shared memory, bytes spilled) of each kernel of the gradient or a few tokens, compiled for an H100.

    jax 0.10 does not say how much shared memory; the compiler refuses too much by itself.
    """
    command = [sys.executable, str(HERE / "compile_for_h100.py"), shape, str(groups), dtype, str(documents)]
    dump = dict(MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_RESOURCES="1")
    run = subprocess.run(command, env=os.environ | dump, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    said = run.stdout + run.stderr
    shared = [int(n) for n in re.findall(r"smem_scratch_bytes=(\d+)", said)]
    spilled = [
        int(n) for n in re.findall(r"(\d+) bytes spill stores, \d+ bytes spill loads\n *ptxas info *: Used", said)
    ]
    assert spilled and len(shared) in (0, len(spilled)), said
    return shared, spilled


needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="jax's CUDA plug-in is not installed",
)


@needs_plugin
@pytest.mark.parametrize("case", [MAIN[0], *(pytest.param(c, marks=pytest.mark.slow) for c in MAIN[1:])])
def test_compiles_without_spills(case):
    shared, spilled = assembled(*case)
    assert len(spilled) >= 2 and not any(spilled)
    assert max(shared, default=0) <= SHARED_MEMORY


@needs_plugin
@pytest.mark.parametrize("case", [("64x2x2048x16", 1, "bfloat16", 0), ("2x8x1024x64", 3, "float32", 1)])
def test_a_few_tokens_compile_in_place(case):
    """The donated state is read and written by one kernel, and never copied."""
    _, spilled = assembled(*case)
    assert spilled == [0]


@needs_plugin
@pytest.mark.slow
@pytest.mark.parametrize("case", ODD)
def test_odd_shapes_compile(case):
    """The interpreter takes what the compiler refuses."""
    shared, spilled = assembled(*case)
    assert len(spilled) >= 2 and max(shared, default=0) <= SHARED_MEMORY
