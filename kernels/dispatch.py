"""Choice of an operation's implementation: by name, or the measured winner on the platform it is lowered for."""

import functools
import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax

logger = logging.getLogger(__name__)

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def platforms() -> tuple[str, ...]:
    """The platforms that a computation traced here can be lowered for.

    With a mesh this is the mesh's platform. Without one it is the CPU and the available accelerator. Each additional
    platform costs time to trace. It also costs memory: the residuals that one platform's implementation saves for the
    backward pass are stored as zeros on the others.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return (lowered_name(device.platform),)
    return tuple(p for p in PLATFORMS if p in ("cpu", lowered_name(jax.default_backend())))


class UnsupportedError(ValueError):
    """A named implementation cannot serve this call; the message says why."""


def lowered_name(platform: str) -> str:
    """A platform's name in lowering rules: jax.default_backend() says "gpu" for "cuda"."""
    return {"gpu": "cuda"}.get(platform, platform)


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)


def choose(
    operation: str,
    backends: Mapping[str, ModuleType],
    winners: Mapping[str, tuple[str, ...]],
    platform: str,
    **facts: object,
) -> tuple[str, str]:
    """The implementation that `None` selects on a platform, and the reason.

    Args:
        backends: implementations by name. Each has `supports(platform=..., **facts) -> reason | None`. If the user
            requested it by name, the facts include `named=True`; then it also accepts calls for which another
            implementation is faster.
        winners: names by platform, fastest first as measured. The last one supports every call.
        platform: "cpu", "cuda", "rocm" or "tpu" ("gpu" means "cuda").
        **facts: static facts of the call that `supports` judges, such as shapes and dtypes.
    """
    platform = lowered_name(platform)
    skipped: list[str] = []
    for name in winners.get(platform, winners["default"]):
        reason = backends[name].supports(platform=platform, **facts)
        if reason is None:
            return name, "; ".join([*skipped, f"{'next' if skipped else 'first'} choice on {platform}"])
        skipped.append(f"{name} skipped: {reason}")
        _log_once(f"{operation} on {platform}: {skipped[-1]}")
    raise UnsupportedError(f"{operation} on {platform}: no implementation can serve ({'; '.join(skipped)})")


def require(operation: str, backends: Mapping[str, ModuleType], name: str, **facts: object) -> ModuleType:
    """The backend named `name`.

    Raises:
        UnsupportedError: there is no backend of this name, or it does not support the call.
    """
    if name not in backends:
        raise UnsupportedError(f"{operation}: implementation {name!r} is unknown; there are {', '.join(backends)}")
    reason = backends[name].supports(platform=platforms()[-1], named=True, **facts)
    if reason is not None:
        raise UnsupportedError(f"{operation}: implementation {name!r} cannot serve: {reason}")
    return backends[name]


def dispatch(
    operation: str,
    backends: Mapping[str, ModuleType],
    winners: Mapping[str, tuple[str, ...]],
    implementation: str | None,
    facts: Mapping[str, object],
    call: Callable,
    *arrays: Any,
) -> Any:
    """Run `call(backend, *arrays)` with the named backend, or the winner on the platform that this is lowered for."""
    if implementation:
        return call(require(operation, backends, implementation, **facts), *arrays)
    chosen = {p: choose(operation, backends, winners, p, **facts)[0] for p in platforms()}
    if len(names := set(chosen.values())) == 1:
        return call(backends[names.pop()], *arrays)
    branches = {p: functools.partial(call, backends[name]) for p, name in chosen.items()}
    return jax.lax.platform_dependent(*arrays, **branches)
