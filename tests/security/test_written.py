"""Files that a user asks for replace nothing of other origin, and pages hold no markup of others."""

from __future__ import annotations

import io
import os
import re
import shutil
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pyarrow
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from pyarrow import parquet

from lifelong_moe.errors import ConfigError, visible
from lifelong_moe.evaluation.routed_text import RoutedText, RoutedToken, html_page
from pipelines.inspect.inspect import inspect_stage
from pipelines.shared.markdown import plain, table_row
from pipelines.shared.options import InspectionRequest
from pipelines.shared.output import SafeConsole

EARLIER = Path(__file__).parents[1] / "integration/earlier"
ENDINGS = {"html": ".html", "save": ".parquet"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a small store."""
    shutil.copytree(EARLIER, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    torch.set_num_threads(1)
    return tmp_path / "here"


def inspected(option: str, path: str, *, force: bool = False) -> None:
    asked = InspectionRequest(text="apple", force=force, **{option: path})
    inspect_stage("old", None, asked, SafeConsole(io.StringIO()))


@pytest.mark.parametrize("option", ENDINGS)
def test_a_file_of_ours_is_replaced(option: str) -> None:
    path = Path(f"x{ENDINGS[option]}")
    inspected(option, str(path))
    before = path.stat().st_ino
    inspected(option, str(path))
    assert path.stat().st_ino != before


def foreign_table(path: Path) -> None:
    parquet.write_table(pyarrow.table({"a": [1]}).replace_schema_metadata({"generator": "other"}), path)


FOREIGN: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("precious"),
    "empty": lambda path: path.touch(),
    "page": lambda path: path.write_text('<!doctype html>\n<html><head><meta charset="utf-8"><title>mine</title>'),
    "table": foreign_table,
    "half a table": lambda path: path.write_bytes(b"PAR1" + b"\xff" * 64 + b"\x10\x00\x00\x00PAR1"),
}


@pytest.mark.parametrize("option", ENDINGS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_another_file_is_replaced_with_force_alone(option: str, kind: str) -> None:
    path = Path(f"x{ENDINGS[option]}")
    FOREIGN[kind](path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=rf"^--{option}=x.*or --force"):
        inspected(option, str(path))
    assert path.read_bytes() == before
    inspected(option, str(path), force=True)
    assert path.read_bytes() != before


KINDS: dict[str, Callable[[Path, Path], object]] = {
    "link": lambda path, other: path.symlink_to(other),
    "dangling link": lambda path, other: path.symlink_to(other.with_name("nosuch")),
    "link to a device": lambda path, other: path.symlink_to("/dev/null"),
    "fifo": lambda path, other: os.mkfifo(path),
}


@pytest.mark.parametrize("option", ENDINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("force", [False, True])
def test_links_and_devices_are_never_replaced_or_written_through(option: str, kind: str, force: bool) -> None:
    path, other = Path(f"x{ENDINGS[option]}"), Path("other")
    inspected(option, f"theirs{ENDINGS[option]}")
    Path(f"theirs{ENDINGS[option]}").rename(other)
    KINDS[kind](path, other)
    before = path.lstat(), other.read_bytes()
    with pytest.raises(ConfigError, match=rf"^--{option}=x.*give another name\.$"):
        inspected(option, str(path), force=force)
    assert (path.lstat(), other.read_bytes()) == before and not Path("nosuch").exists()


def test_a_file_that_comes_meanwhile_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*args: object) -> None:
        Path("x.html").write_text("precious")

    monkeypatch.setattr("pipelines.inspect.tables.text", measured)
    with pytest.raises(ConfigError, match="or --force"):
        inspected("html", "x.html")
    assert Path("x.html").read_text() == "precious"


def test_force_without_a_file_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="--force concerns the files of --html and --save"):
        inspect_stage("old", None, InspectionRequest(force=True), SafeConsole(io.StringIO()))


MARKUP = (
    "![p](http://evil.example/p.png) [l](javascript:alert(1)) <img src=x onerror=alert(1)> <b>&lt;</b> **b** _i_ `c`"
    " ~~s~~ a|b \\| a_b __c__ &amp; &#60; <http://evil.example>\n# h\n- x\n1. y\n\n    code\n> q\n---\n\x1b[31m\u202e"
)
PIECES = st.sampled_from([*MARKUP, "![", "](", "<!--", "```", "~~~", "\n\n", "\n    ", "&#", "\n[a]: x\n", "http://"])
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@given(text=st.lists(PIECES, min_size=1).map("".join))
@example(text=MARKUP)
def test_markdown_shows_what_others_wrote(text: str) -> None:
    row = "\n".join([table_row(["a", "b"]), "|---|---|", table_row(["x", text])])
    page = Page(MARKDOWN.render(f"Reason: {plain(text)}.\n\n- x: {plain(text)}\n\n{row}\n"))
    assert page.tags <= {"p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td"}
    # Renderers join spaces, also those at the ends of a cell.
    shown = "".join(visible(text, keep="").split())
    assert "".join("".join(page.texts).split()) == f"Reason:{shown}.x:{shown}abx{shown}"


def test_a_line_of_its_own_begins_no_block() -> None:
    for text in ("# h", "> q", "- x", "+ x", "=== x", " --- x"):
        assert Page(MARKDOWN.render(plain(text))).tags == {"p"}, text


def test_html_holds_text_of_others_as_text() -> None:
    tokens = [RoutedToken(1, MARKUP, 0, [[(MARKUP, 1.0)]])]
    page = html_page(RoutedText([MARKUP], [0], tokens), MARKUP)
    found = Page(page)
    assert found.tags <= {"html", "head", "meta", "title", "style", "body", "h1", "p", "span", "pre"}
    assert {char for char in page if unicodedata.category(char) in ("Cc", "Cf")} == {"\n"}
    assert not re.search(r"<script|href|url\(|@import", page) and MARKUP[:40] in "".join(found.texts)
