"""Bytes to text, in an encoding that is known and never guessed: a wrong guess gives letters that nobody wrote."""

from __future__ import annotations

import codecs
import re

from lifelong_moe.config.data import ENCODINGS
from lifelong_moe.data.formats.outcomes import LeftOutError, Outcome

UTF8 = "utf-8"
# UTF-32 before UTF-16: the mark of the one begins with that of the other.
_MARKS = (
    (codecs.BOM_UTF8, UTF8),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_WIDE = ("utf-16-le", "utf-16-be")
_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([A-Za-z0-9_.:-]{1,40})""", re.IGNORECASE)
_DECLARED_WITHIN = 1024
"""Bytes at the beginning of a page in which it may declare its encoding (HTML, section 4.2.5.4)."""
_AS_BROWSERS = {"iso8859-1": "cp1252", "ascii": "cp1252"}
"""What pages that declare these are written in (Encoding Standard, section 4.2)."""


def decoded(data: bytes, where: str, otherwise: str | None = None) -> tuple[str, str]:
    """Return a text and the encoding that it was read by: that of its byte order mark, UTF-8, or ``otherwise``.

    UTF-16 that is stated comes before UTF-8 where there are zero bytes: Latin letters in UTF-16 are also valid UTF-8,
    with a NUL beside each, which no text holds.

    Args:
        data: The whole file.
        where: Its name, for messages.
        otherwise: Encoding of a file that has no mark and is not UTF-8, one of
            :data:`~lifelong_moe.config.data.ENCODINGS`; None if it is unknown.

    Raises:
        LeftOutError: It is in none of these; names the first wrong byte.
    """
    mark, encoding = next((known for known in _MARKS if data.startswith(known[0])), (b"", UTF8))
    if not mark and otherwise is not None and codecs.lookup(otherwise).name in _WIDE and b"\0" in data:
        encoding = otherwise
    try:
        return data[len(mark) :].decode(encoding), encoding
    except UnicodeDecodeError as error:
        if mark or otherwise is None or encoding == otherwise:
            place, remedy = (
                error.start + len(mark),
                "" if mark or otherwise else " Set encoding, or convert it with iconv.",
            )
            raise LeftOutError(
                f"{where}: invalid {encoding.upper()} at byte {place} (0x{data[place]:02x}).{remedy}",
                Outcome.other_encoding,
            ) from None
    try:
        return data.decode(otherwise), otherwise
    except UnicodeDecodeError as error:
        raise LeftOutError(
            f"{where}: neither UTF-8 nor {otherwise}, see byte {error.start} (0x{data[error.start]:02x}).",
            Outcome.other_encoding,
        ) from None


def declared_by(page: bytes) -> str | None:
    """The encoding that an HTML page declares, if it is one of those that are known here."""
    found = _CHARSET.search(page[:_DECLARED_WITHIN])
    if found is None:
        return None
    try:
        name = codecs.lookup(found[1].decode("ascii")).name
    except LookupError:
        return None
    name = _AS_BROWSERS.get(name, name)
    # The declaration was found as ASCII, so the page is not UTF-16 whatever it says (HTML, section 13.2.3.3).
    return name if name in ENCODINGS and name not in _WIDE else None
