"""The configs of the project: one file each, with `get_config(preset)`.

From Python a config's module may be called: `seqmodels.configs.mamba("130m", steps=100)` is its preset with fields
replaced. Names with dots go into a dict: `mamba("small", **{"optimizer.learning_rate": 1e-3})`.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict


class Config(ModuleType):
    """A module of this folder."""

    def __call__(self, preset: str | None = None, **fields: Any) -> ConfigDict:
        """The config of a preset, "small" if there is none, with some fields replaced.

        Raises: ValueError for an unknown preset, UserError for a field or value that is not allowed.
        """
        from seqmodels.config import override

        return override(self.get_config(preset), fields)


class Configs(ModuleType):
    """This folder. Its modules are imported when they are asked for."""

    def __getattr__(self, name: str) -> ModuleType:
        if not name.startswith("_") and importlib.util.find_spec(f"{self.__name__}.{name}"):
            return importlib.import_module(f"{self.__name__}.{name}")
        raise AttributeError(f"there is no config {name!r} in {self.__name__}")

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and hasattr(value, "get_config"):  # as import does for a new module
            value.__class__ = Config
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = Configs
