"""Operations of sequence mixers, each with several implementations. Imported as `seqmodels.kernels`."""

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any


class Operations(Mapping[str, ModuleType]):
    """Maps the name of each operation to its module, which is imported at the first access.

    Each module defines a function with the operation's name, `BACKENDS` and `IMPLEMENTATIONS`. `choose(platform,
    **facts)` returns the name of the default implementation and the reason. `axes(**arrays)` returns the logical axes
    of the arrays (see `seqmodels.kernels.axes`). If "length" is one of these axes, the submodule `sharded` defines the
    same function for one device's piece of time.
    """

    def __init__(self, *names: str) -> None:
        self._names = names

    def __getitem__(self, name: str) -> ModuleType:
        if name not in self._names:
            raise KeyError(f"{name!r} is no operation; there are {', '.join(self._names)}")
        return importlib.import_module(f"seqmodels.kernels.{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


OPERATIONS = Operations(
    "selective_scan",
    "short_conv",
    "attention",
    "linear_attention",
    "delta_rule",
    "linear_scan",
    "grouped_matmul",
    "long_conv",
    "hyper_connection",
    "attn_residual",
)


def interpret(**options: Any) -> contextlib.AbstractContextManager[None]:
    """A context in which Pallas kernels run in jax's interpreters, on a CPU; see `seqmodels.kernels.interpreter`."""
    from seqmodels.kernels import interpreter

    return interpreter.interpret(**options)


if __name__ == "kernels":  # old scripts in a checkout import the folder by this name: give them the same modules
    from seqmodels.alias import alias

    alias("kernels", "seqmodels.kernels")
