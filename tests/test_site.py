"""The documentation: links lead somewhere, quoted errors exist, and the reference holds what it names."""

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from seqmodels.branches import BRANCHES

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def text_of(page):
    return FENCE.sub("", page.read_text())


def anchors(page):
    """Those of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading(page):
    for target in LINK.findall(text_of(page)):
        if re.match(r"[a-z]+:", target):
            continue  # the network
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}; there are {sorted(anchors(file))}"


def test_every_page_is_on_the_site():
    listed = set(re.findall(r"([\w/]+\.md)", (ROOT / "mkdocs.yml").read_text()))
    there = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").glob("*.md")}
    assert there == {name for name in listed if "/" not in name and name != "index.md"}


def test_errors_of_the_faq_are_those_of_the_code():
    quoted = [words for line in re.findall(r"^### (.*)$", (ROOT / "docs" / "faq.md").read_text(), re.MULTILINE)
              for words in re.findall(r"`([^`]+)`", line)]  # fmt: skip
    code = " ".join(path.read_text() for path in (ROOT / "seqmodels").rglob("*.py"))
    code = re.sub(r'"\s*f?"', "", code)  # texts that go on in the next line
    assert len(quoted) > 10
    for words in quoted:
        assert words in code, words


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks():
    return module_of(ROOT / "docs" / "hooks.py")


def test_the_reference_has_the_docstrings(hooks):
    pages = {name: hooks.reference(*about) for name, about in hooks.REFERENCE.items()}
    assert "## seqmodels.load\n\n```python\nload(" in pages["python"] and "### Trained.generate" in pages["python"]
    assert "- `batch_size`: rows per step, over all hosts." in pages["data"] and "**Raises:**" in pages["data"]
    assert "## Mamba (mamba)" in hooks.mixers() and "## RwkvChannel (rwkv_channel)" in hooks.mixers()
    assert "## seqmodels.kernels.selective_scan.selective_scan" in hooks.kernels()
    listed = re.findall(r"api/(\w+)\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted([*pages, "mixers", "kernels"])


@pytest.mark.slow
def test_the_notebooks_run(tmp_path, hooks, monkeypatch):
    """Each cell runs, and the notebook has the outputs of a run of these cells, with what they find to be true."""
    execute = module_of(ROOT / "docs" / "notebooks" / "execute.py")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(BRANCHES, "_places", dict(BRANCHES._places))  # one adds a mixer
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        (tmp_path / path.stem).mkdir()
        kept, now = json.loads(path.read_text()), execute.run(path, tmp_path / path.stem)
        printing, printed = ([bool(cell["outputs"]) for cell in execute.cells(content)] for content in (kept, now))
        assert printing == printed and any(printed), "python docs/notebooks/execute.py"
        texts = [[line for cell in execute.cells(content) for output in cell["outputs"] for line in output["text"]]
                 for content in (kept, now)]  # fmt: skip
        true = [[line for line in text if line.endswith((": True\n", ": False\n"))] for text in texts]
        assert true[0] == true[1] and not any(": False" in line for line in true[0])
        assert "```text" in hooks.notebook(path)


def test_links_out_of_the_site_become_names(hooks):
    def shown(text, page):
        return hooks.on_page_markdown(text, SimpleNamespace(file=SimpleNamespace(src_uri=page)))

    assert shown("[a](../benchmarks/x.md)", "data.md") == "a (`benchmarks/x.md`)"
    assert (
        shown("[a](data.md#tokenizers), [b](https://x.y)", "python.md") == "[a](data.md#tokenizers), [b](https://x.y)"
    )
    assert shown("[`LICENSE`](LICENSE)", "index.md") == "`LICENSE`"
