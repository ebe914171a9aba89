"""Markdown that shows names, reasons and sentences as they are: no link, picture, tag or heading of theirs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lifelong_moe.errors import visible

# An underscore within a word, as in most names, is no emphasis and stays.
_ACTIVE = re.compile(r"[\\`*\[\]~|]|(?<![^\W_])_|_(?![^\W_])|^\s*[#+=>-]")
_ENTITY = re.compile(r"&(?=#|\w)")


def plain(text: str) -> str:
    """Escape a text for Markdown; it stays on one line and shows as it was."""
    escaped = _ACTIVE.sub(lambda found: f"{found[0][:-1]}\\{found[0][-1]}", visible(text, keep=""))
    # Entities, because the renderer of MLflow's pages knows no backslash before these two.
    return _ENTITY.sub("&amp;", escaped).replace("<", "&lt;")


def table_row(cells: Sequence[str]) -> str:
    """A row of a table of plain cells."""
    return "| " + " | ".join(map(plain, cells)) + " |"
