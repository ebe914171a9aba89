"""Encodings are known or stated, never guessed."""

from __future__ import annotations

import codecs

import pytest

from lifelong_moe.config.data import ENCODINGS, is_known_encoding
from lifelong_moe.data.formats.encodings import declared_by, decoded
from lifelong_moe.data.formats.outcomes import LeftOutError, Outcome


@pytest.mark.parametrize(
    ("data", "read_as"),
    [
        ("é".encode(), "utf-8"),
        (codecs.BOM_UTF8 + "é".encode(), "utf-8"),
        (codecs.BOM_UTF16_LE + "é".encode("utf-16-le"), "utf-16-le"),
        (codecs.BOM_UTF16_BE + "é".encode("utf-16-be"), "utf-16-be"),
        (codecs.BOM_UTF32_LE + "é".encode("utf-32-le"), "utf-32-le"),
    ],
)
def test_marks(data: bytes, read_as: str) -> None:
    # A stated encoding is for what has neither mark nor the form of UTF-8.
    assert decoded(data, "a.txt") == decoded(data, "a.txt", "cp1252") == ("é", read_as)


def test_stated_encodings() -> None:
    data = "é".encode("cp1252")
    with pytest.raises(LeftOutError, match=r"a\.txt: invalid UTF-8 at byte 0 \(0xe9\)") as error:
        decoded(data, "a.txt")
    assert error.value.outcome == Outcome.other_encoding
    assert decoded(data, "a.txt", "cp1252") == ("é", "cp1252")
    with pytest.raises(LeftOutError, match="neither UTF-8 nor cp1252"):
        decoded(b"\x81", "a.txt", "cp1252")
    with pytest.raises(LeftOutError, match="invalid UTF-16-LE at byte 2"):
        decoded(codecs.BOM_UTF16_LE + b"a", "a.txt", "cp1252")
    assert all(is_known_encoding(name) for name in ENCODINGS)


@pytest.mark.parametrize("name", ["utf-16-le", "utf-16-be", "UTF_16LE"])
def test_stated_utf_16_is_used_for_latin_letters_which_are_valid_utf_8_too(name: str) -> None:
    assert decoded("Hello\n".encode(name), "a.txt", name) == ("Hello\n", name)
    # Without zero bytes it is a text in UTF-8 among the others.
    assert decoded("Größe\n".encode(), "a.txt", name) == ("Größe\n", "utf-8")
    with pytest.raises(LeftOutError, match=r"invalid UTF.16.* at byte 10 \(0x..\)\.$") as error:
        decoded("Hello\n".encode(name)[:-1], "a.txt", name)
    assert error.value.outcome == Outcome.other_encoding


@pytest.mark.parametrize(
    ("page", "name"),
    [
        (b"<meta charset=koi8-r>", "koi8-r"),
        (b'<META http-equiv="Content-Type" content="text/html; charset=Windows-1251">', "cp1251"),
        (b"<meta charset=latin1>", "cp1252"),
        (b"<meta charset=utf-7>", None),
        (b"<meta charset=nothing>", None),
        (b"<meta charset=utf-16le>", None),
        (b" " * 1024 + b"<meta charset=koi8-r>", None),
    ],
)
def test_pages_that_declare_theirs(page: bytes, name: str | None) -> None:
    assert declared_by(page) == name
