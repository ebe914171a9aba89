"""Remove the secrets within URLs, which must not reach a file, message or link."""

from __future__ import annotations

import re

# Not urlsplit: a database's password may hold "#", "?" and "@", at which it would end the user part.
_USER = re.compile(r"(?<=://)[^/\s]*@")
_QUERY = re.compile(r"(://[^?\s]*)\?\S*")


def without_credentials(text: str, mask: str = "") -> str:
    """Remove user, password and query, which may be secret, from every URL in a text.

    Args:
        text: A URL, or a message that contains some.
        mask: Their replacement, to show that something was there.
    """
    text = _USER.sub(f"{mask}@" if mask else "", text)
    return _QUERY.sub(rf"\1?{mask}" if mask else r"\1", text)
