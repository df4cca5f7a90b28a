"""What holds for every test process: eight CPU devices, so that sharding is tested wherever the tests run, and less
time for compiling, which takes longer here than computing."""

import gc
import os
import socket
from importlib import metadata
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Without LLVM's optimisations the tests take a third of the time, and without the compiler's newer way to emit fusions
# half of that. From jax 0.11 on there is no other way. A program in one piece rather than in one for each core takes a
# sixth less.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if metadata.version("jaxlib").startswith("0.10.") else ""),
)
# What JAX compiles is kept for the other tests, the commands that they start, and the next run. A key is the program
# with its compiler, flags and devices, so nothing stale is found. Code is made for the host's CPU: a directory by host.
# JAX's warning about an entry that another process has not yet written to its end is ignored (pyproject.toml): the
# program is then compiled again.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled" / socket.gethostname())
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import numpy as np
import pytest

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True)
def start_of_draws(request):
    """A test draws the same numbers from the RNG of its file, whichever test ran before it."""
    if (rng := getattr(request.module, "RNG", None)) is not None:
        rng.bit_generator.state = np.random.default_rng(0).bit_generator.state


@pytest.fixture(scope="module", autouse=True)
def forget_what_is_compiled():
    """After each file: no other file calls its programs, and thousands in memory make garbage collections long."""
    yield
    jax.clear_caches()


# Files of few but long tests. A worker takes whole files: one of these at the end would leave the others idle.
FIRST = (
    "test_selective_scan_gpu",  # on Python 3.12, where it runs in the interpreter
    "test_depth",
    "test_branches",
    "test_site",
    "test_resume",
    "test_debug",
    "test_docs",
    "test_fuzz",
    "test_sweep_real",
    "test_processes",
    "test_kills",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first; `make test` keeps this order."""
    place = {name: at for at, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(FIRST)))


def pytest_collection_finish() -> None:
    """What is imported stays, so garbage collections need not look at it; the others become rare, as tracing makes
    many objects that live."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 50)
