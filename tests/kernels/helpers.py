"""What the tests of the kernels share: random arguments, values and gradients, their comparison, compilation."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels.arrays import expand_to
from seqmodels.kernels.dispatch import lowered_name
from seqmodels.kernels.short_conv import short_conv

COMPILE = Path(__file__).resolve().parent / "compile_for_h100.py"
SHARED_MEMORY = 227 * 1024  # bytes a block, of an H100

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
needs_cuda_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="jax's CUDA plug-in is not installed",
)


def serving(op: ModuleType, **facts: Any) -> list[str]:
    """Names of an operation's implementations that serve such a call on the platform at hand."""
    facts = dict(platform=lowered_name(jax.default_backend()), named=True) | facts
    return [name for name, backend in op.BACKENDS.items() if backend.supports(**facts) is None]


def documents(batch: int = 2, length: int = 9, seed: int = 0, packed: bool = True, padded: bool = True) -> dict:
    """Random segment_ids with initial_segment, and mask."""
    draw = np.random.default_rng(seed + 100)
    out = {}
    if packed:
        out["segment_ids"] = np.cumsum(draw.random((batch, length)) < 0.25, axis=1).astype(np.int32)
        out["initial_segment"] = np.zeros(batch, np.int32)
    if padded:
        out["mask"] = draw.random((batch, length)) < 0.7
    return out


def random_documents(seed: int, batch: int, length: int, changes: float, real: float, first: int) -> dict:
    """The same with these chances of a change of documents and of a real token; `first` is the state's document."""
    draw = np.random.default_rng(seed)
    return dict(
        segment_ids=np.cumsum(draw.random((batch, length)) < changes, axis=1).astype(np.int32),
        initial_segment=np.full(batch, first, np.int32),
        mask=draw.random((batch, length)) < real,
    )


def value_and_gradients(
    operation: Callable,
    args: Mapping[str, Any],
    static: Mapping[str, Any],
    implementation: str,
    options: Mapping[str, Any] | None = None,
    patched: str = "",
):
    """y, the final state, and the gradients of a random functional of both; y on real tokens where others are free.

    All is compiled once for each shape, operation, implementation, set of options, and interpreter.

    Args:
        operation: a public function of kernels with a state.
        args: what gradients are taken of. static: segment_ids, initial_segment, mask.
        options: other arguments of the operation, hashable.
        patched: says what a test has changed in the operation's modules, of which jit's caches know nothing.
    """
    options = tuple(sorted((options or {}).items()))
    return _value_and_gradients(args, dict(static), operation, implementation, options, patched)


@functools.partial(jax.jit, static_argnames=("operation", "implementation", "options", "patched"))
def _value_and_gradients(args, static, operation, implementation, options, patched):
    def outputs(args):
        y, state = operation(**args, **static, **dict(options), implementation=implementation)
        if "mask" in static and operation is not short_conv:  # whose y is zero on padding
            y = jnp.where(expand_to(static["mask"], y.ndim), y, 0)
        return y, state

    results, pull = jax.vjp(outputs, args)
    draw = np.random.default_rng(7)
    (gradients,) = pull(tuple(jnp.asarray(draw.normal(size=x.shape), x.dtype) for x in results))
    return results, gradients


def expected(operation: Callable, args: Mapping[str, Any], static: Mapping[str, Any], options=None):
    """`value_and_gradients` of the reference in float64, from the same numbers."""
    with jax.enable_x64(True):
        double = {name: np.asarray(x, np.float64) for name, x in args.items()}
        return value_and_gradients(operation, double, static, "reference", options)


@functools.cache
def compiled(operation: Callable, implementation: str, **options: Any) -> Callable:
    """The operation by one of its implementations, compiled once for each shape."""
    return jax.jit(functools.partial(operation, implementation=implementation, **options))


def assert_close(ours: Any, reference: Any, tolerance: float) -> None:
    """Each array is near in the Frobenius norm, relative to the reference's."""
    for (path, x), want in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(reference), strict=True):
        x, want = np.asarray(x, np.float64), np.asarray(want, np.float64)
        error = np.linalg.norm(x - want) / max(np.linalg.norm(want), 1e-30)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.2e}"


def assert_finite(tree: Any) -> None:
    for path, x in jax.tree.leaves_with_path(tree):
        assert np.isfinite(x).all(), jax.tree_util.keystr(path)


def poisoned(args: Mapping[str, Any], mask: Any, names: tuple[str, ...]) -> dict:
    """`args` with NaN on padding in the named arrays [B, T, ...]."""
    mask = np.asarray(mask)
    nan = {k: np.where(expand_to(mask, v.ndim), v, np.nan).astype(v.dtype) for k, v in args.items() if k in names}
    return {**args, **nan}


def halves(args: Mapping[str, Any], cut: int, names: tuple[str, ...]) -> tuple[dict, dict]:
    """Arguments of the first `cut` tokens and of the others; the named ones and those of documents are over time."""
    names = (*names, "segment_ids", "mask")
    head = {k: v[:, :cut] if k in names else v for k, v in args.items()}
    tail = {k: v[:, cut:] if k in names else v for k, v in args.items()}
    return head, tail


def last_segment(static: Mapping[str, Any], cut: int) -> np.ndarray:
    """[B] int32: the document of the state after `cut` tokens: that of the last real one, else the initial one."""
    mask = np.asarray(static.get("mask", np.ones_like(static["segment_ids"], bool)))
    rows = zip(static["initial_segment"], static["segment_ids"], mask, strict=True)
    return np.array([[first, *ids[:cut][real[:cut]]][-1] for first, ids, real in rows], np.int32)


def in_two_calls(
    operation: Callable, args: Mapping[str, Any], static: Mapping[str, Any], cut: int, names: tuple[str, ...]
):
    """y and the final state by two calls, the second of which goes on from the first one's state."""
    head, tail = halves({**args, **static}, cut, names)
    first, state = operation(**head)
    tail |= dict(initial_state=state)
    if "segment_ids" in static:
        tail |= dict(initial_segment=last_segment(static, cut))
    second, state = operation(**tail)
    return jnp.concatenate([first, second], axis=1), state


def stacked(trees: list) -> Any:
    """One tree of arrays with a new first axis."""
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def assembled(operation: str, *arguments: Any) -> tuple[list[int], list[int]]:
    """(bytes of shared memory, bytes spilled) of each kernel of `compile_for_h100.py`.

    jax 0.10 does not say how much shared memory; the compiler refuses too much by itself.
    """
    command = [sys.executable, str(COMPILE), operation, *map(str, arguments)]
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
