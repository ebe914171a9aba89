"""What all pages share: colours, style, escaping, tables and pictures.

A page is one file that a browser shows without a network: it runs nothing and fetches nothing, and its content security
policy forbids both, so that text of others stays text even if an escape were forgotten. It follows the reader's choice
of a light or dark scheme, is read with a keyboard and by a screen reader, and says nothing by colour alone.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lifelong_moe.errors import visible
from lifelong_moe.storage.marks import PAGE_BEGINS

LIGHT: Mapping[str, str] = {
    "paper": "#ffffff", "ink": "#1b1f24", "quiet": "#57606a", "line": "#d0d7de", "band": "#f3f5f7",
    "accent": "#0b57a4", "worse": "#fde3d3", "better": "#d7ecfb", "own": "#ecf3dc",
}  # fmt: skip
DARK: Mapping[str, str] = {
    "paper": "#14181d", "ink": "#e4e8ec", "quiet": "#a3adb8", "line": "#3b444e", "band": "#1e242b",
    "accent": "#7cb8f5", "worse": "#57301c", "better": "#183c5a", "own": "#2f3a1c",
}  # fmt: skip
"""Colours by use, for both schemes; ``tests/unit/reports/pages/test_shell.py`` computes their contrasts."""
INKS = ("ink", "quiet", "accent")
GROUNDS = ("paper", "band", "worse", "better", "own")
"""Each ink may stand on each ground."""
BLACK = "#111111"
"""Ink on the light colours of tokens, in both schemes."""
JOINT = re.compile(r"(?<=[_/-])(?=\w)")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = (
    "*{box-sizing:border-box}"
    "body{font:16px/1.55 system-ui,sans-serif;margin:0;color:var(--ink);background:var(--paper)}"
    "main{max-width:76rem;margin:0 auto;padding:1rem 1.25rem 4rem}"
    "h1{font-size:1.7rem;line-height:1.25;margin:.6rem 0 .2rem}h2{font-size:1.25rem;margin:2.2rem 0 .6rem}"
    "h1,td,th,p,dd,figcaption{overflow-wrap:anywhere}p,li,figcaption{max-width:60rem}"
    "a{color:var(--accent)}:focus-visible{outline:3px solid var(--accent);outline-offset:2px}"
    "nav ul{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;list-style:none;padding:0;margin:.8rem 0}"
    ".quiet,figcaption{color:var(--quiet)}.verdict{font-size:1.1rem;font-weight:600}"
    ".scroll{overflow-x:auto;margin:.6rem 0;border:1px solid var(--line);border-radius:6px}"
    "table{border-collapse:collapse;font-size:.9rem;min-width:100%}"
    "th,td{padding:.35rem .7rem;border-top:1px solid var(--line);text-align:right;vertical-align:top;min-width:7.5rem}"
    "tr:first-child>*{border-top:0}thead+tbody>tr:first-child>*{border-top:1px solid var(--line)}"
    "td{white-space:nowrap;font-variant-numeric:tabular-nums}td small{display:block;font-size:.85em}"
    "td.text{white-space:normal;text-align:left;min-width:11.5rem}tfoot{font-weight:600}"
    "th{text-align:left;font-weight:600}thead th{background:var(--band);vertical-align:bottom}"
    "thead th.number{text-align:right}"
    # The name of a row stays beside its numbers while they scroll.
    "th:first-child{position:sticky;left:0;min-width:8rem;background:var(--paper)}thead th:first-child{background:"
    "var(--band)}@media(min-width:48rem){th:first-child{min-width:11rem}}"
    ".worse{background:var(--worse)}.better{background:var(--better)}.own{background:var(--own);font-weight:700}"
    ".said{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}"
    "figure{margin:.6rem 0}figcaption{font-size:.9rem;padding:.3rem 0}"
    # Pictures are drawn on white, and stay legible where the screen is narrow: then they scroll.
    "img{display:block;max-width:none;background:#fff}@media(min-width:48rem){img{max-width:100%;height:auto}}"
    "code,pre{font-family:ui-monospace,monospace}code{background:var(--band);padding:.1em .35em;border-radius:4px}"
    "dt{margin-top:.7rem}dd{margin:.1rem 0 0 1.2rem}summary{cursor:pointer;color:var(--accent)}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:15px;line-height:1.9}"
    "@media print{.scroll{overflow:visible}nav{display:none}}"
)


class Html(str):
    """Markup of ours. Any other string is text, and is escaped where it is put on a page."""


def put(content: str) -> Html:
    """Markup as it is, and of any other text what shows it: no tag, and nothing that reorders what a browser shows."""
    return content if isinstance(content, Html) else Html(html.escape(visible(content)))


def tag(name: str, *content: str, **attributes: str) -> Html:
    """An element; attributes named like words of Python end with ``_``."""
    told = "".join(f' {key.strip("_").replace("_", "-")}="{_attribute(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{told}>{''.join(map(put, content))}</{name}>")


def joined(parts: Iterable[str], between: str = "\n") -> Html:
    """One piece after the other, by default each on a line of the page's source."""
    return Html(between.join(map(put, parts)))


def scrolling(label: str, content: Html) -> Html:
    """Content that may be wider than the screen; a keyboard can scroll it, too."""
    return tag("div", content, class_="scroll", role="region", aria_label=label, tabindex="0")


def table(
    caption: str, headers: Sequence[str], rows: Sequence[Sequence[str]], *, texts: Sequence[int] = (), feet: int = 0
) -> Html:
    """A table whose first column names its rows.

    Args:
        caption: What it shows, with units.
        headers: Of the columns.
        rows: Cells as text or markup; a markup that is a whole ``<td>`` stays one.
        texts: Columns of words, which are set to the left; others hold numbers.
        feet: How many of the last rows sum up the others.
    """
    head = (
        tag("th", _breakable(title), scope="col", **({} if j == 0 or j in texts else {"class_": "number"}))
        for j, title in enumerate(headers)
    )
    lines = [tag("tr", tag("th", _breakable(row[0]), scope="row"), *_cells(row, texts)) for row in rows]
    middle = len(lines) - feet
    parts = [tag("thead", tag("tr", *head)), tag("tbody", *lines[:middle])]
    if feet:
        parts.append(tag("tfoot", *lines[middle:]))
    return tag("figure", tag("figcaption", caption), scrolling(caption, tag("table", *parts)))


def cell(content: str, kind: str = "", said: str = "") -> Html:
    """A cell of a kind that has a colour; ``said`` tells those who do not see it the same."""
    hidden = (tag("span", f" {said}", class_="said"),) if said else ()
    return tag("td", content, *hidden, **({"class_": kind} if kind else {}))


def picture(png: bytes, alt: str, caption: str) -> Html:
    """A picture within the page."""
    # No other address than the data themselves.
    data = base64.b64encode(png).decode("ascii")
    image = Html(f'<img src="data:image/png;base64,{data}" alt="{_attribute(alt)}">')
    return tag("figure", scrolling(caption, image), tag("figcaption", caption))


def document(title: str, body: Iterable[str], *, key: str = "", rules: str = "") -> str:
    """A whole page.

    Args:
        title: Of the window and of the page.
        body: What follows the title.
        key: What the page was made of, as :func:`beginning` writes it.
        rules: Further rules of style.
    """
    schemes = (
        f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
        f"@media(prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    )
    return (
        f"{beginning(key)}"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{tag('title', title)}\n<style>{schemes}{STYLE}{rules}</style></head>\n"
        f"<body><main>\n{tag('h1', title)}\n{joined(body)}\n</main></body></html>\n"
    )


def beginning(key: str) -> str:
    """How a page begins that was made of what ``key`` stands for, so that it is not made again."""
    known = f'<meta name="content-key" content="{_attribute(key)}">' if key else ""
    return f"{PAGE_BEGINS}{known}\n"


def _breakable(name: str) -> Html:
    """A name that a narrow column breaks at its joints, before it breaks it anywhere."""
    return put(name) if isinstance(name, Html) else joined(JOINT.split(name), "<wbr>")


def _cells(row: Sequence[str], texts: Sequence[int]) -> list[Html]:
    return [_cell(one, j in texts) for j, one in enumerate(row[1:], start=1)]


def _cell(content: str, is_text: bool) -> Html:
    if isinstance(content, Html) and content.startswith("<td"):
        return content
    return cell(_breakable(content), "text") if is_text else cell(content)


def _variables(colours: Mapping[str, str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in colours.items())


def _attribute(text: Any) -> str:
    return html.escape(visible(str(text))).replace("\n", "&#10;")
