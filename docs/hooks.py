"""Makes the pages of the site that are no Markdown in docs/: the first page, of README.md, notebooks, API reference.

MkDocs calls `on_files` and `on_page_markdown` (mkdocs.yml). Nothing is fetched, and no page is written to disk.
"""

import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# Pages of the reference: title, what it is for, and "module:name"; a module alone stands for its __all__
REFERENCE: dict[str, tuple[str, str, list[str]]] = {
    "python": ("Use from Python", "`import seqmodels as sq`; examples are in [From Python](../python.md).", [
        "seqmodels:load", "seqmodels:from_pretrained", "seqmodels:train", "seqmodels.trained:Trained",
    ]),
    "data": ("Data", "`from seqmodels.data import load`; see [Data](../data.md).", [
        "seqmodels.data", "seqmodels.data.mixture:Mixture", "seqmodels.data.stream:Stream",
        "seqmodels.data.contract:BatchSplit",
    ]),
    "model": ("Models", "See [Architecture](../architecture.md).", [
        "seqmodels.model:build", "seqmodels.model:build_for", "seqmodels.model:SequenceModel",
        "seqmodels.sequence:Sequence", "seqmodels.branch:Branch", "seqmodels.layers.parameter:parameter",
    ]),
    "generation": ("Generation and evaluation", "See [Evaluation](../evaluation.md).", [
        "seqmodels.generation:generate", "seqmodels.evals.run:load_run", "seqmodels.evals.run:Run",
    ]),
}  # fmt: skip
SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises):\s*(.*)")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    sys.path.insert(0, str(ROOT))  # here, as MkDocs takes back what this file does while it is loaded
    readme = re.sub(r"\]\(docs/", "](", (ROOT / "README.md").read_text())
    pages = {"index.md": readme, "api/mixers.md": mixers(), "api/kernels.md": kernels()}
    pages |= {f"notebooks/{path.stem}.md": notebook(path) for path in sorted((ROOT / "docs").glob("notebooks/*.ipynb"))}
    pages |= {f"api/{name}.md": reference(*about) for name, about in REFERENCE.items()}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files of the repository that are no pages become their names: the site has no copy of them."""
    folder = Path("docs") / Path(page.file.src_uri).parent

    def shown(match: re.Match) -> str:
        text, target, _ = match.groups()
        place = os.path.normpath(folder / target)
        if page.file.src_uri == "index.md" and not (ROOT / place).exists():
            place = target  # README.md is in the folder above
        if re.match(r"[a-z]+:", target) or place.startswith("docs/"):
            return match[0]
        return text if text.strip("`") == place else f"{text} (`{place}`)"

    return LINK.sub(shown, markdown)


def notebook(path: Path) -> str:
    """A notebook with what its cells print."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [f"```text\n{''.join(output['text']).strip()}\n```" for output in cell.get("outputs", [])]
    return "\n\n".join(parts) + "\n"


def reference(title: str, about: str, names: Iterable[str]) -> str:
    """A page with the signature and the docstring of each name."""
    parts = [f"# {title}", about]
    for name in names:
        module, _, member = name.partition(":")
        loaded = importlib.import_module(module)
        parts += [
            described(f"{module}.{each}", getattr(loaded, each)) for each in ([member] if member else loaded.__all__)
        ]
    return "\n\n".join(parts) + "\n"


def mixers() -> str:
    """The page of all branches in the registry."""
    from seqmodels.branches import BRANCHES

    about = "`sq.mixers.Mamba(width=64)` is a module of its own ([From Python](../python.md))."
    parts = ["# Mixers and channel branches", f"{about} In brackets: the name in a pattern."]
    parts += [described(f"{branch.__name__} ({name})", branch, members=False) for name, branch in BRANCHES.items()]
    return "\n\n".join(parts) + "\n"


def kernels() -> str:
    """The page of all operations."""
    from seqmodels.kernels import OPERATIONS

    parts = ["# Kernels", "Pure functions of arrays; see [Kernels](../kernels.md)."]
    parts += [described(f"seqmodels.kernels.{name}.{name}", getattr(OPERATIONS[name], name)) for name in OPERATIONS]
    return "\n\n".join(parts) + "\n"


def described(name: str, thing: Any, level: int = 2, members: bool = True) -> str:
    """Heading, signature and docstring; of a class also its public methods, if `members`."""
    kind = "class " if inspect.isclass(thing) else ""
    parts = [f"{'#' * level} {name}", f"```python\n{kind}{name.split(' ')[0].split('.')[-1]}{_signature(thing)}\n```"]
    parts.append(docstring(inspect.getdoc(thing) or ""))
    if inspect.isclass(thing) and members:
        for member, value in vars(thing).items():
            function = value.fget if isinstance(value, property) else inspect.unwrap(value) if callable(value) else None
            if not member.startswith("_") and inspect.isfunction(function) and function.__doc__:
                parts.append(described(f"{name.split('.')[-1]}.{member}", function, level + 1))
    return "\n\n".join(part for part in parts if part)


def _signature(thing: Any) -> str:
    try:
        return str(inspect.signature(thing)).replace("~", "")
    except (TypeError, ValueError):
        return "(...)"


def docstring(text: str) -> str:
    """A docstring in Markdown: the entries of Args and the like become lists."""
    lines: list[str] = []
    inside, margin = False, 0
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if match := SECTION.fullmatch(line):
            lines += ["", f"**{match[1]}:** {match[2]}".rstrip(), ""]
            inside, margin = True, 0
        elif inside and line.strip() and indent:
            margin = margin or indent
            head, colon, rest = line.strip().partition(": ")
            if indent == margin and (colon or line.rstrip().endswith(":")):
                lines.append(f"- `{head}`: {rest}")
            else:
                lines.append("  " * bool(indent) + line.strip())
        else:
            inside = inside and not line.strip()
            lines.append(line)
    return "\n".join(lines).strip()
