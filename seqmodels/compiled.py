"""JAX's cache of compiled programs on the disk: a command that is given again does not compile again."""

import contextlib
import hashlib
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path

from seqmodels import job

MOST = 2**31  # bytes of the cache; beyond, the oldest programs are removed


def use() -> None:
    """Makes JAX keep compiled programs in `folder`, before the first one is compiled.

    JAX_COMPILATION_CACHE_DIR names another folder, which is left alone. Where nothing can be written there is no cache.
    """
    import jax

    # a program that another process is just writing is compiled here
    warnings.filterwarnings("ignore", message="Error reading persistent compilation cache entry")
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    with contextlib.suppress(OSError, RuntimeError):  # a home that is read-only, or not known
        place = folder()
        place.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(place))
        trim(place, MOST)  # may fail where another process trims it too


def folder() -> Path:
    """The cache of this host and kind of processor: programs for another one may not run. All hosts of a job share one,
    as they run one program, which the first process writes."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    host = "job" if job.current().count > 1 else platform.node()
    return Path(root).expanduser() / "seqmodels" / "compiled" / f"{host}-{_processor()}"


def trim(place: Path, most: int) -> None:
    """Removes the oldest files until the others have at most so many bytes."""
    files = sorted((path for path in place.iterdir() if path.is_file()), key=lambda path: path.stat().st_mtime)
    size = sum(path.stat().st_size for path in files)
    for path in files:
        if size <= most:
            return
        size -= path.stat().st_size
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """A context in which nothing is read from the cache or written, to measure what compiling takes."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # or JAX goes on as it began
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _processor() -> str:
    """8 hexadecimal digits for the instructions that the processor has."""
    known = [platform.machine()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        known += [next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags")]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:8]
