"""Every public function of the package says the type of its parameters and of its result."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "seqmodels"
FOLDERS = (PACKAGE, PACKAGE / "kernels", PACKAGE / "configs")  # the last two are links, which rglob does not follow


def modules():
    """Paths of all public modules, from the package on."""
    found = {path.relative_to(PACKAGE): path for folder in FOLDERS for path in folder.rglob("*.py")}
    return {str(name): path for name, path in sorted(found.items()) if is_public(path)}


def is_public(path):
    return path.name == "__init__.py" or not path.name.startswith("_")


def untyped(source):
    """Each public function of a module that lacks types, with the names of the parameters, and "return"."""
    lacking = {}

    def visit(body, prefix, method):
        for node in filter(node_is_public, body):
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.", True)
            elif isinstance(node, ast.FunctionDef):
                lacking[prefix + node.name] = without_type(node, method)

    visit(ast.parse(source).body, "", False)
    return {name: names for name, names in lacking.items() if names}


def node_is_public(node):
    name = getattr(node, "name", "_")
    return not name.startswith("_") or (name.startswith("__") and name.endswith("__"))


def without_type(function, method):
    """Names of the parameters without a type, `self` and `cls` apart, and "return" where the result has none."""
    spec = function.args
    positional = [*spec.posonlyargs, *spec.args]
    static = any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)
    positional = positional[1:] if method and not static else positional
    others = [argument for argument in (spec.vararg, *spec.kwonlyargs, spec.kwarg) if argument is not None]
    names = [argument.arg for argument in (*positional, *others) if argument.annotation is None]
    return names + (["return"] if function.returns is None else [])


def test_public_functions_are_typed():
    lacking = {name: untyped(path.read_text()) for name, path in modules().items()}
    assert {name: functions for name, functions in lacking.items() if functions} == {}


def test_what_lacks_a_type_is_found():
    source = """
class Model:
    def __init__(self, width: int): ...
    def __call__(self, x, *, state: dict = None) -> tuple: ...
    @staticmethod
    def of(name) -> "Model": ...
    def _step(self, x): ...

def load(path: str, *parts, **options): ...
def save(path: str) -> None: ...
def _read(path): ...
"""
    assert untyped(source) == {
        "Model.__init__": ["return"],
        "Model.__call__": ["x"],
        "Model.of": ["name"],
        "load": ["parts", "options", "return"],
    }


def test_links_are_followed():
    some = {"model.py", "kernels/dispatch.py", "configs/mamba.py", "kernels/selective_scan/mosaic_gpu/stage.py"}
    assert some <= set(modules())
