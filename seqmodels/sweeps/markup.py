"""A page as Markdown and as one HTML file, which loads no other file and needs no network."""

import base64
import dataclasses
import html
from collections.abc import Sequence

STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 100rem; padding: 0 1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td { white-space: nowrap }
th, td { border-bottom: 1px solid #8886; padding: .25rem .7rem; text-align: right }
th { border-bottom-width: 2px; vertical-align: bottom }
.text { text-align: left }
tbody tr:hover { background: #8882 }
img { max-width: 100%; background: white; border-radius: 4px }
pre { background: #8882; padding: .7rem; overflow-x: auto; border-radius: 4px }
"""
# The browser itself refuses whatever is not in the file.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclasses.dataclass
class Table:
    """The first `texts` columns are text, the others numbers."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 2


@dataclasses.dataclass
class Picture:
    """A PNG. HTML contains it; Markdown links the file `name`."""

    name: str
    description: str
    png: bytes


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
        case Picture(name, description, _):
            return f"![{description}]({name})"
        case Code(text, heading):
            fence = "`" * max(3, text.count("`") + 1)
            return (f"{heading}\n\n" if heading else "") + f"{fence}\n{text}\n{fence}"
        case text:
            return text


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def page(title: str, blocks: Sequence[Block]) -> str:
    """The HTML file."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        + "\n".join(map(_html, blocks))
        + "\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Table(headers, rows, texts):
            head = _row(headers, "th", texts)
            body = "\n".join(_row(row, "td", texts) for row in rows)
            return f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>'
        case Picture(_, description, png):
            data = base64.b64encode(png).decode()
            return f'<p><img alt="{html.escape(description)}" src="data:image/png;base64,{data}"></p>'
        case Code(text, heading):
            shown = f"<pre>{html.escape(text)}</pre>"
            return f"<details><summary>{html.escape(heading)}</summary>{shown}</details>" if heading else shown
        case text:
            return f"<p>{html.escape(text)}</p>"


def _row(cells: Sequence[str], tag: str, texts: int) -> str:
    kinds = [' class="text"' if i < texts else "" for i in range(len(cells))]
    row = "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
    return f"<tr>{row}</tr>"
