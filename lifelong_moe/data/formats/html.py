"""The text of an HTML page, in one pass over it.

Python's own ``html.parser`` takes time that grows with the square of a hostile page (CVE-2025-6069), and a fast parser
would be one more dependency for the little that is wanted: no tree, only where text begins and ends. What is not valid
is read as browsers read it: an unclosed comment, tag or script lasts to the end of the page.

Source:
    HTML Standard, sections 13.2.5 (tokenization) and 15.3 (which elements are blocks).
"""

from __future__ import annotations

import html
import re

# A quote opens a string only as the first of a value: elsewhere it is a letter of a name or of a value without quotes.
# Possessive (`*+`), so that a tag without an end is not tried again from each of its attributes. The last alternative
# is a name without a value; where a `=` comes next, what follows is a string without an end.
_TAG = re.compile(
    r"""<(/?)([A-Za-z][^\t\n\f\r />]*+)"""
    r"""((?:[\t\n\f\r /]|[^\t\n\f\r />][^\t\n\f\r />=]*+"""
    r"""(?:[\t\n\f\r ]*+=[\t\n\f\r ]*+(?:"[^"]*+"|'[^']*+'|(?!["'])[^\t\n\f\r >]*+)|(?![\t\n\f\r ]*+=)))*+)>"""
)
_MARKUP = re.compile(r"<(?=[A-Za-z/!?])")
_LONG_NUMBER = re.compile(r"&#[0-9]{20,};?")
"""No character has so large a number, which Python also refuses to read."""
_RAW = ("script", "style", "title", "textarea", "iframe", "noembed", "noframes", "noscript", "xmp", "plaintext")
"""Elements without tags inside, which end with their own end tag; none of them is text of the page."""
_UNSEEN = ("template", "svg", "math", "select", "object", "canvas", "audio", "video")
"""Elements that are left out with everything inside them."""
_LINES = ("br", "tr", "li", "dt", "dd", "option", "div", "caption", "figcaption", "summary", "legend", "address")
"""Elements that begin and end a line."""
_PARAGRAPHS = (
    *("p", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "pre", "ul", "ol", "dl", "table", "hr", "body", "form"),
    *("section", "article", "aside", "header", "footer", "main", "nav", "figure", "details", "fieldset", "hgroup"),
)
"""Elements with an empty line before and after them."""
_CELLS = ("td", "th")
_GAPS = ("", " ", "\n", "\n\n")
"""What may stand between two pieces of text, narrow to wide."""
_SPACE, _LINE, _EMPTY_LINE = 1, 2, 3
_AS_SPACE = dict.fromkeys(map(ord, "\t\n\r\f"), " ")
_ENDS = {name: re.compile(rf"</{name}(?=[\s/>])", re.IGNORECASE) for name in _RAW}


def text_of_html(page: str) -> str:
    """Return a page's text: without scripts, styles, comments and tags, with a line for each block.

    Outside ``pre``, spaces and line ends of the source are one space each, as a browser shows them. Menus and footers
    are text like any other.

    Args:
        page: The whole page; time and memory are proportional to its length.
    """
    reader = _Reader()
    place = 0
    while (found := _MARKUP.search(page, place)) is not None:
        reader.add(page[place : found.start()])
        if (end := _end_of_markup(page, found.start(), reader)) is None:
            # It lasts to the end of the page.
            return reader.text()
        place = end
    reader.add(page[place:])
    return reader.text()


def _end_of_markup(page: str, start: int, reader: _Reader) -> int | None:
    """Read what begins with a ``<``; returns where it ends, None if nowhere."""
    if page.startswith("<!--", start):
        # `<!-->` and `<!--->` are whole comments.
        return _after(page, "-->", start + 2)
    if (tag := _TAG.match(page, start)) is None:
        # `<!doctype …>`, `<?xml …>`, `</ …>`; a letter would have begun a tag, which then has no end.
        return None if page[start + 1].isalpha() or _is_end_tag(page, start) else _after(page, ">", start)
    name = tag[2].lower()
    closes = bool(tag[1])
    if not closes and name in _RAW and not reader.is_hidden:
        found = _ENDS[name].search(page, tag.end())
        return None if found is None else _after(page, ">", found.start())
    reader.tag(name, closes=closes, is_whole=tag[3].endswith("/"))
    return tag.end()


def _is_end_tag(page: str, start: int) -> bool:
    letter = page[start + 2 : start + 3]
    # A letter beyond ASCII begins no name, but a comment.
    return page.startswith("/", start + 1) and letter.isascii() and letter.isalpha()


def _after(page: str, end: str, start: int) -> int | None:
    place = page.find(end, start)
    return None if place < 0 else place + len(end)


class _Reader:
    """Collects text between tags, and decides what stands between two pieces of it."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._gap = 0
        """What comes before the next piece of text, a place in :data:`_GAPS`."""
        self._hidden: str | None = None
        """The outermost element that is left out, if we are inside one."""
        self._depth = 0
        """How many elements of that name are open. A number, since nesting may be as deep as a page is long."""
        self._pre = 0

    @property
    def is_hidden(self) -> bool:
        """Whether text is left out here."""
        return self._hidden is not None

    def add(self, text: str) -> None:
        """Take text between two tags, with its references to characters."""
        if self._hidden is not None or not text:
            return
        if "&" in text:
            text = html.unescape(_LONG_NUMBER.sub("\ufffd", text))
        if self._pre:
            self._piece(text.replace("\r\n", "\n"))
            return
        # Not `str.split()`: a no-break space is no end of a word.
        words = text.translate(_AS_SPACE).split(" ")
        inner = " ".join(filter(None, words))
        if not words[0]:
            self._widen(_SPACE)
        if inner:
            self._piece(inner)
            if not words[-1]:
                self._widen(_SPACE)

    def _piece(self, text: str) -> None:
        self._parts += (_GAPS[self._gap], text)
        self._gap = 0

    def _widen(self, gap: int) -> None:
        # Two blocks that end together have one empty line after them.
        self._gap = max(self._gap, gap)

    def tag(self, name: str, *, closes: bool, is_whole: bool) -> None:
        """Take a tag; ``is_whole`` for one like ``<svg/>``, which has no end tag."""
        if self._hidden is not None:
            if name == self._hidden and not is_whole:
                self._depth += -1 if closes else 1
                self._hidden = self._hidden if self._depth else None
            return
        if name in _UNSEEN and not closes and not is_whole:
            self._hidden, self._depth = name, 1
        elif name == "pre":
            self._pre = max(0, self._pre + (-1 if closes else 1))
        if name in _PARAGRAPHS:
            self._widen(_EMPTY_LINE)
        elif name in _LINES:
            self._widen(_LINE)
        elif name in _CELLS:
            self._widen(_SPACE)

    def text(self) -> str:
        """All that was taken."""
        return "".join(self._parts).strip()
