"""What must be in no file, message or link: the secrets within URLs."""

from __future__ import annotations

import re

_USER = re.compile(r"(?<=://)[^/\s]*@")  # a database's password may hold "#", "?" and "@", at which urlsplit would end
_QUERY = re.compile(r"(://[^?\s]*)\?\S*")


def without_credentials(text: str, mask: str = "") -> str:
    """Remove what may be secret from every URL in a text: user, password and query.

    Args:
        text: Such as a URL, or a message with one.
        mask: What stands in their place, to show that something was there.
    """
    text = _USER.sub(f"{mask}@" if mask else "", text)
    return _QUERY.sub(rf"\1?{mask}" if mask else r"\1", text)
