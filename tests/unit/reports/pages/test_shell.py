"""Pages are legible in both schemes, and text that is not ours is text."""

from __future__ import annotations

import re

import pytest

from lifelong_moe.evaluation.routed_text import RoutedText
from lifelong_moe.reports.pages.shell import (
    BLACK,
    DARK,
    GROUNDS,
    INKS,
    LIGHT,
    Html,
    cell,
    document,
    picture,
    put,
    table,
    tag,
)

LEAST_CONTRAST = 4.5
"""Of WCAG 2, level AA, for text of ordinary size."""


def contrast(one: str, other: str) -> float:
    """WCAG 2's ratio of the relative luminances of two colours ``#rrggbb``."""

    def luminance(colour: str) -> float:
        shares = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in shares]
        return sum(weight * one for weight, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_each_ink_is_legible_on_each_ground(scheme: dict[str, str]) -> None:
    found = {(ink, ground): contrast(scheme[ink], scheme[ground]) for ink in INKS for ground in GROUNDS}
    assert {pair: ratio for pair, ratio in found.items() if ratio < LEAST_CONTRAST} == {}
    assert scheme.keys() == {*INKS, *GROUNDS, "line"}


def test_black_is_legible_on_the_colour_of_each_owner() -> None:
    for num in (1, 2, 3, 12, 64):
        colours = RoutedText([str(i) for i in range(num)], [0], []).colours
        assert len(set(colours)) == num
        assert min(contrast(BLACK, colour) for colour in colours) > LEAST_CONTRAST


def test_text_is_escaped_and_markup_is_not() -> None:
    assert put('<b>"&\x1b') == "&lt;b&gt;&quot;&amp;\\x1b" and put(Html("<b>")) == "<b>"
    assert tag("p", "<i>", Html("<br>"), class_="a", aria_label='"x"\ny') == (
        '<p class="a" aria-label="&quot;x&quot;&#10;y">&lt;i&gt;<br></p>'
    )
    assert 'alt="&quot;&gt;"' in picture(b"", '">', "<") and "<figcaption>&lt;</figcaption>" in picture(b"", "", "<")


def test_headers_of_a_table_say_what_they_head() -> None:
    rows = [["a_b", "1.5", "x_y"], ["sum", cell("2", "own", "here"), "–"]]
    found = table("all <of> it", ["name", "size", "words"], rows, texts=[2], feet=1)
    assert re.findall(r"<th [^>]*>", found) == [
        '<th scope="col">', '<th scope="col" class="number">', '<th scope="col">', *2 * ['<th scope="row">'],
    ]  # fmt: skip
    # Names break at their joints, numbers nowhere; what a colour says is said in words, too.
    assert "a_<wbr>b" in found and '<td class="text">x_<wbr>y</td>' in found and "<td>1.5</td>" in found
    assert '<td class="own">2<span class="said"> here</span></td>' in found
    assert 'aria-label="all &lt;of&gt; it" tabindex="0"' in found and found.count("<tfoot>") == 1


def test_a_page_has_a_language_and_both_schemes_and_fetches_nothing() -> None:
    page = document("a <title>", [tag("p", "x")], key="k")
    assert page.startswith('<!doctype html>\n<html lang="en">') and 'name="viewport"' in page
    assert "prefers-color-scheme:dark" in page and "color-scheme:light dark" in page
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page and "a &lt;title&gt;" in page
    used = set(re.findall(r"var\(--(\w+)\)", page))
    assert used == LIGHT.keys() == DARK.keys()
