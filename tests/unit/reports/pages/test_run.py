"""What a run's page says, and to whom."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from lifelong_moe.reports.pages.run import CURVES, LOAD, SECTIONS, page_begins, run_page
from lifelong_moe.reports.report import Report
from lifelong_moe.reports.verdict import GLOSSARY, report_verdict
from lifelong_moe.store.lineage import LineageRow
from tests.unit.reports.test_report import report as plain_report

ROW = LineageRow(
    name="english", key="1" * 64, parent=None, data={"english": "3" * 64}, tokenizer="4" * 64,
    experts="english/L0/E0..1", borrowed_tensors=0, weights_sha256="2" * 64,
    signed_by=None, signature_verified=False, checkpoint=None,
)  # fmt: skip
IMAGES = {CURVES: b"\x89PNG", LOAD: b"\x89PNG"}


class Outline(HTMLParser):
    """Tags with their attributes, and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def made(rows: list[list[float]], **options: str) -> tuple[Report, str]:
    report = Report.from_json(plain_report(["english", "python"], rows, **options))
    return report, run_page(report, [ROW], IMAGES)


def test_a_page_says_what_a_run_came_to() -> None:
    report, page = made([[2.0, 6.0, 7.0], [2.5, 3.0, 6.5]])
    text = Outline(page).text
    for said in (*report_verdict([report]), *GLOSSARY, *SECTIONS, "1.250", "(+0.250)", "+0.250", "english/L0/E0..1"):
        assert said in text, said
    # What old text lost, in words for those who do not see colours.
    assert re.search(r'class="worse">1\.250<small>\(\+0\.250\)</small><span class="said"> worse</span>', page)
    assert page.count("learned here") == 2 and text.count("lifelong-moe ") == 5


def test_what_was_not_clearly_lost_has_no_colour() -> None:
    _, page = made([[2.0, 6.0, 7.0], [2.01, 3.0, 6.5]])
    assert "<td>1.005<small>(+0.005)</small></td>" in page and 'class="worse"' not in page
    _, page = made([[2.0, 6.0, 7.0], [1.0, 3.0, 6.5]])
    assert 'class="better">0.500' in page


def test_a_page_can_be_read_without_seeing_it() -> None:
    _, page = made([[2.0, 6.0, 7.0], [2.5, 3.0, 6.5]])
    tags = Outline(page).tags
    headings = [int(name[1]) for name, _ in tags if re.fullmatch("h[1-6]", name)]
    assert headings == [1, *[2] * len(SECTIONS)]
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {f"#{one}" for one in ids} >= {attributes["href"] for name, attributes in tags if name == "a"}
    assert set(ids) >= {attributes["aria-labelledby"] for _, attributes in tags if "aria-labelledby" in attributes}
    assert all(attributes["alt"] for name, attributes in tags if name == "img")
    assert all(attributes["scope"] in ("row", "col") for name, attributes in tags if name == "th")
    # What can be scrolled can be scrolled with keys, and says what it is.
    assert all(
        attributes["tabindex"] == "0" and attributes["role"] == "region" and attributes["aria-label"]
        for _, attributes in tags
        if attributes.get("class") == "scroll"
    )


def test_a_page_is_known_by_its_report() -> None:
    (one, page), (other, _) = made([[2.0, 6.0, 7.0], [2.5, 3.0, 6.5]]), made([[2.0, 6.0, 7.0], [2.5, 3.1, 6.5]])
    assert page.startswith(page_begins(one)) and page_begins(one) != page_begins(other)
