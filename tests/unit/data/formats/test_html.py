"""The text of pages, valid or not, and in a time that grows with their length."""

from __future__ import annotations

import time

import pytest

from lifelong_moe.data.formats.html import text_of_html


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<h1>A &amp; B</h1><p>one <b>t</b>wo\n three<br>four</p>", "A & B\n\none two three\nfour"),
        ("<ul><li>a</li><li> b </li></ul>c", "a\nb\n\nc"),
        ("<table><tr><td>1</td><td>2</td></tr><tr><td>3</table>", "1 2\n3"),
        ("x<pre>a  b\r\n  c</pre>y", "x\n\na  b\n  c\n\ny"),
        ("<STYLE>p {}</style>a<script>'</p>' < \"b\"</SCRIPT >b<title>no</title>", "ab"),
        ("<!doctype html><?xml?><!-- > <p> -->a<!-->b</ x>c", "abc"),
        ("<a title=\"x > y\" href='>'>link</a> 1 < 2 <3", "link 1 < 2 <3"),
        ("a<svg><svg/><text>no</text><svg></svg></svg>b<template>no", "ab"),
        ("a&nbsp;b&#x41;&#66;&notanentity; &", "a\xa0bAB&notanentity; &".replace("&notanentity", "¬anentity")),
        (f"a&#{'9' * 5000};b", "a\ufffdb"),  # Python reads no number of so many digits
        # A quote opens a string only right after `=` and white space.
        ('<p>a</p><a href="x"">link</a><p>rest</p>', "a\n\nlink\n\nrest"),
        ("<p title=it's>one</p><p>two</p>", "one\n\ntwo"),
        ('<a href=a"b>hello</a>"', 'hello"'),
        ("<a \"x' = '>' b=>c<i '>d<i a = \n\">\"/b=c>e<i =\">f", "cdef"),
        ("a</é>b", "ab"),
        # What has no end lasts to the end of the page.
        *(
            (f"a{bad}", "a")
            for bad in ("<!-- x", "<script>x", "<a href='>x", '<a b =">x', "<b", "</b", "<!doctype", "<style")
        ),
        ("", ""),
    ],
)
def test_text(page: str, text: str) -> None:
    assert text_of_html(page) == text


@pytest.mark.parametrize(
    "piece",
    [
        *("<", "<a", '<a "', "<a '", '<a b="', "<a b = ", "<a =", "<!--", "<!", "</", "</x", "<script>", "<svg>"),
        *("<pre>", "<p>", "&#", "&#9"),
    ],
)
def test_time_grows_with_the_page_and_not_with_its_square(piece: str) -> None:
    page = piece * (200_000 // len(piece))
    begin = time.process_time()
    text_of_html(page)
    # A square would take minutes; half a second is what this takes at most here.
    assert time.process_time() - begin < 20
