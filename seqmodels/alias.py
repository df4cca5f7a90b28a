"""A second name for a package, under which the very same modules are found."""

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `<alias>.x` as the module `<package>.x`."""

    def __init__(self, alias: str, package: str):
        self.alias, self.package = alias, package

    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith(self.alias + "."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.package + spec.name.removeprefix(self.alias))
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has put the alias's there


def alias(name: str, package: str) -> None:
    """Make `import <name>` and `import <name>.x` give the modules of `package`."""
    sys.modules[name] = importlib.import_module(package)
    sys.meta_path.insert(0, _Finder(name, package))
