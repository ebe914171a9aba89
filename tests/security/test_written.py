"""Files that a user asks for replace nothing of other origin, and pages hold no markup of others."""

from __future__ import annotations

import io
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from pyarrow import parquet

from lifelong_moe.errors import ConfigError, visible
from lifelong_moe.evaluation.routed_text import RoutedText, RoutedToken
from lifelong_moe.reports.pages.routed_text import text_page
from lifelong_moe.reports.pages.run import CURVES, LOAD, run_page
from lifelong_moe.reports.report import Report
from lifelong_moe.store.lineage import LineageRow
from pipelines.inspect.inspect import inspect_stage
from pipelines.shared.markdown import plain, table_row
from pipelines.shared.options import InspectionRequest
from pipelines.shared.output import SafeConsole
from tests.unit.reports.test_report import report as whole_report

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
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

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


TAGS = (
    "html head meta title style body main h1 h2 p span pre sup ol li nav ul a section details summary dl dt dd "
    "code figure figcaption div img table thead tbody tfoot tr th td small wbr"
)

ATTRIBUTES = (
    "lang charset name http-equiv content class id href src alt role tabindex title scope value aria-label "
    "aria-labelledby"
)


def is_inert(page: str) -> bool:
    """Whether a page has our tags alone, runs nothing, and names no address but places and pictures within itself."""
    found = Page(page)
    inner = all(str(value).startswith(("#", "data:image/png;base64,"))
                for name, value in found.attributes if name in ("href", "src"))  # fmt: skip
    known = found.tags <= set(TAGS.split()) and {name for name, _ in found.attributes} <= set(ATTRIBUTES.split())
    shown = {char for char in page if unicodedata.category(char) in ("Cc", "Cf")} <= {"\n"}
    policy = "default-src 'none'" in page.split("<title>")[0]
    return inner and known and shown and policy and not re.search(r"url\(|@import", page)


def test_html_holds_text_of_others_as_text() -> None:
    tokens = [RoutedToken(1, MARKUP, 0, [[(MARKUP, 1.0)]])]
    page = text_page(RoutedText([MARKUP], [0], tokens), MARKUP)
    assert is_inert(page) and MARKUP[:40] in "".join(Page(page).texts)


def test_the_page_of_a_run_holds_text_of_others_as_text() -> None:
    """Whatever a store of somebody else holds: names, routing, hashes and experts."""
    found = Report.from_json(whole_report(["english", "python"], [[2.0, 6.0, 7.0], [2.5, 3.0, 6.5]]))
    names = dict(zip(found.distributions, (MARKUP, f"{MARKUP}2", f"{MARKUP}3"), strict=True))

    def renamed(by_name: Mapping[str, Any]) -> dict[str, Any]:
        return {names[name]: value for name, value in by_name.items()}

    stages = [replace(one, name=names[one.name], learns=[names[n] for n in one.learns], key=MARKUP, routing=MARKUP)
              for one in found.stages]  # fmt: skip
    fields = ("forgetting", "forgetting_bits_per_byte", "bytes_per_token", "routing", "expert_counts")
    changed = {name: renamed(getattr(found, name)) for name in fields}
    row = LineageRow(
        name=MARKUP, key=MARKUP, parent=MARKUP, data={MARKUP: MARKUP}, tokenizer=MARKUP, experts=MARKUP,
        borrowed_tensors=0, weights_sha256=MARKUP, signed_by=MARKUP, signature_verified=False,
        checkpoint={"architecture": MARKUP, "sha256": MARKUP},
    )  # fmt: skip
    hostile = replace(found, run=MARKUP, method=MARKUP, distributions=list(names.values()), stages=tuple(stages),
                      not_measured=[MARKUP], **changed)  # fmt: skip
    page = run_page(hostile, [row], {CURVES: b"\x89PNG", LOAD: b"\x89PNG"})
    assert is_inert(page) and "".join(Page(page).texts).count(MARKUP[:40]) > 20
