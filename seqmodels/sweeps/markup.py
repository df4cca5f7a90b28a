"""A page as Markdown, as LaTeX tables, and as one HTML file, which loads no other file and needs no network."""

import base64
import dataclasses
import hashlib
import html
import itertools
from collections.abc import Iterator, Sequence

STYLE = """
:root { color-scheme: light dark; --line: #8886; --back: Canvas }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 100rem; padding: 0 1rem }
h1 { font-size: 1.6rem; line-height: 1.25 }
h1, h2, p, summary { overflow-wrap: anywhere }
.wide { overflow-x: auto; margin: 1rem 0 .3rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }
td { white-space: nowrap }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .55rem; text-align: right; background: var(--back) }
th { border-bottom-width: 2px; vertical-align: bottom; max-width: 8rem }
.text { text-align: left }
td.text { white-space: normal; overflow-wrap: break-word; min-width: 2rem; max-width: 26rem }
tbody tr:hover td { background: color-mix(in srgb, var(--back), gray 15%) }
th button { all: unset; cursor: pointer; overflow-wrap: break-word }
th button:hover { text-decoration: underline }
th button:focus-visible { outline: 2px solid }
th[aria-sort=ascending] button::after { content: " ▲" }
th[aria-sort=descending] button::after { content: " ▼" }
.first { position: sticky; left: 0; z-index: 1 }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 29rem), 1fr)); gap: 1rem }
figure { margin: 0 }
img { width: 100%; background: white; border-radius: 4px }
figcaption { font-size: 13px }
pre { background: #8882; padding: .7rem; border-radius: 4px; font-size: 13px }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
details { margin: .3rem 0 1rem }
@media (max-width: 700px) {
  body { margin: 1rem auto; padding: 0 .6rem }
  h1 { font-size: 1.25rem }
  table { font-size: 13px }
  th, td { padding: .25rem .4rem }
  td.text { max-width: 9.5rem }
}
"""
# A click on a heading sorts the rows by that column: numbers by size, others by their text; a second click turns it.
SCRIPT = """
for (const table of document.querySelectorAll("table"))
  table.tHead.rows[0].querySelectorAll("th").forEach((head, column) => {
    head.firstElementChild.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const text = row => row.cells[column].textContent;
      const number = row => parseFloat(text(row).replace(/[,\\[+]/g, ""));
      const rows = [...table.tBodies[0].rows];
      const numeric = !head.classList.contains("text") || rows.every(row => !isNaN(text(row)));
      rows.sort((a, b) => {
        if (!numeric) return up * text(a).localeCompare(text(b), undefined, {numeric: true});
        const [x, y] = [number(a), number(b)];
        return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : up * (x - y);
      });
      table.tBodies[0].append(...rows);
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up > 0 ? "ascending" : "descending");
    });
  });
"""
# The browser itself refuses whatever is not in the file, and every script but that one.
_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'"

TEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
        ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "–": "--", "\n": " ",
    }
)  # fmt: skip


@dataclasses.dataclass
class Table:
    """The first `texts` columns are text, the others numbers."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 2


@dataclasses.dataclass
class Picture:
    """A picture in two forms. HTML contains the PNG; Markdown links it. `name` is that of the files, without ending."""

    name: str
    description: str
    png: bytes
    svg: bytes


@dataclasses.dataclass
class Code:
    """Text that is shown unchanged. If it has a heading, HTML shows it after a click on the heading."""

    text: str
    heading: str = ""


@dataclasses.dataclass
class Heading:
    text: str


Block = str | Heading | Table | Picture | Code


def markdown(title: str, blocks: Sequence[Block]) -> str:
    return "\n\n".join([f"# {title}", *map(_markdown, blocks)]) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Table(headers, rows, texts):
            rule = ["---" if i < texts else "---:" for i in range(len(headers))]
            return "\n".join(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in (headers, rule, *rows))
        case Picture(name, description):
            return f"![{description}]({name}.png)"
        case Code(text, heading):
            fence = "`" * max(3, text.count("`") + 1)
            return (f"{heading}\n\n" if heading else "") + f"{fence}\n{text}\n{fence}"
        case text:
            return text


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def latex(title: str, blocks: Sequence[Block]) -> str:
    """All tables as LaTeX, each under a comment with its heading. They need \\usepackage{booktabs}."""
    heading, parts = title, [r"% \usepackage{booktabs}"]
    for block in blocks:
        match block:
            case Heading(text):
                heading = text
            case Table():
                parts.append(f"% {' '.join(heading.split())}\n{tabular(block)}")
    return "\n\n".join(parts) + "\n"


def tabular(table: Table) -> str:
    """A table as a LaTeX tabular."""
    columns = "".join("l" if i < table.texts else "r" for i in range(len(table.headers)))
    head, *rows = (" & ".join(cell.translate(TEX) for cell in row) + r" \\" for row in (table.headers, *table.rows))
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}"])


def page(title: str, blocks: Sequence[Block]) -> str:
    """The HTML file."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        + "\n".join(_parts(blocks))
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _parts(blocks: Sequence[Block]) -> Iterator[str]:
    """The blocks; pictures that follow one another are side by side where there is room."""
    for pictures, some in itertools.groupby(blocks, lambda block: isinstance(block, Picture)):
        inside = "\n".join(map(_html, some))
        yield f'<div class="pictures">\n{inside}\n</div>' if pictures else inside


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Table(headers, rows, texts):
            head = _row([f"<button>{html.escape(header)}</button>" for header in headers], "th", texts)
            body = "\n".join(_row([html.escape(cell) for cell in row], "td", texts) for row in rows)
            table = f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>\n'
            return table + _html(Code(tabular(block), "LaTeX"))
        case Picture(_, description, png):
            data, about = base64.b64encode(png).decode(), html.escape(description)
            image = f'<img alt="{about}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{about}</figcaption></figure>"
        case Code(text, heading):
            shown = f"<pre>{html.escape(text)}</pre>"
            return f"<details><summary>{html.escape(heading)}</summary>{shown}</details>" if heading else shown
        case text:
            return f"<p>{html.escape(text)}</p>"


def _row(cells: Sequence[str], tag: str, texts: int) -> str:
    """A row of cells in HTML. The first column stays in sight where the table is wider than the window."""
    names = [" ".join(["text"] * (i < texts) + ["first"] * (i == 0)) for i in range(len(cells))]
    kinds = [f' class="{name}"' if name else "" for name in names]
    row = "".join(f"<{tag}{kind}>{cell}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
    return f"<tr>{row}</tr>"
