"""A group of fields: the options of one branch, or one part of a config such as `optimizer`."""

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from seqmodels.errors import UserError
from seqmodels.fields.field import Field
from seqmodels.nearest import nearest


@dataclasses.dataclass(frozen=True)
class Group:
    """Fields that belong together.

    Attributes:
        name: name of the branch, or of the part of the config.
        fields: name of each field, and its declaration.
        check: `check(options, width)` raises UserError (by `refuse`) if the fields do not fit each other or the model's
            width. `options` always has all fields, each with an allowed value.
        path: dotted place in a config. None: `model.<name>`, the place of a branch's options.
    """

    name: str
    fields: Mapping[str, Field]
    check: Callable[[Any, int], None] | None = None
    path: str | None = None

    def __getitem__(self, field: str) -> Any:
        """The default of a field: `state: int = MAMBA["state"]` in the branch's class."""
        return self.fields[field].default

    @property
    def home(self) -> str:
        """Dotted place of the group in a config, such as "model.mamba"; "" for the fields at the top level."""
        return f"model.{self.name}" if self.path is None else self.path

    def place(self, field: str) -> str:
        """Dotted name of a field of this group in a config, such as "model.mamba.state"."""
        return f"{self.home}.{field}" if self.home else field

    def defaults(self, **values: Any) -> ConfigDict:
        """A ConfigDict with every field in the declared order: the given values, and defaults for all others.

        Raises: UserError for a name that is not declared.
        """
        for name, value in values.items():
            if name not in self.fields:
                near = nearest(name, list(self.fields))
                raise UserError(f"config.{self.place(name)}={value!r}: no such field{near}")
        return ConfigDict({name: values.get(name, field.default) for name, field in self.fields.items()})

    def complete(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """These options, and the defaults of those that are missing."""
        return {**{name: field.default for name, field in self.fields.items()}, **options}

    def check_fields(self, options: Any) -> None:
        """Check each field by itself. `options` is a ConfigDict or a module that has some or all fields as attributes.

        Raises: UserError for the first value that is not allowed.
        """
        for name, field in self.fields.items():
            field.check(self.place(name), getattr(options, name, field.default))

    def validate(self, options: Any, width: int) -> None:
        """Check each field by itself, and then whether they fit each other and the model's width.

        Raises: UserError for the first mistake.
        """
        self.check_fields(options)
        if self.check is not None:
            complete = {name: getattr(options, name, field.default) for name, field in self.fields.items()}
            self.check(SimpleNamespace(**complete), width)


@functools.cache
def group(name: str) -> Group | None:
    """The options of the branch `name`, which `seqmodels/fields/<name>.py` declares as `<NAME>`; None: it has none."""
    module = f"seqmodels.fields.{name}"
    if not name.isidentifier() or importlib.util.find_spec(module) is None:
        return None
    found = getattr(importlib.import_module(module), name.upper(), None)
    return found if isinstance(found, Group) else None
