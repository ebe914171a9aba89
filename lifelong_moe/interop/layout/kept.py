"""Small files of a checkpoint that its stage keeps, since a model which grew from it goes out with them. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lifelong_moe.data.formats.strict_json import parse_object
from lifelong_moe.interop.layout.folder import CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG
from lifelong_moe.storage.opening import read_bounded

TEMPLATE, CARD, LICENSE = "chat_template.jinja", "README.md", "LICENSE"
OUT = (TOKENIZER_CONFIG, GENERATION_CONFIG, TEMPLATE, LICENSE)
"""Go out as they came in."""
MOST_BYTES = 4 << 20
"""What is larger is not kept: published ones have a hundredth."""
_LICENSE_KEY = re.compile(r"^license:\s*([A-Za-z0-9][A-Za-z0-9.-]{0,60})\s*$", re.MULTILINE)


def kept_texts(folder: Path) -> dict[str, str]:
    """Texts of a checkpoint's folder by the names under which a stage keeps them; unreadable ones are left out."""
    found = {}
    for name in (CONFIG, CARD, *OUT):
        try:
            found[_kept_as(name)] = read_bounded(folder / name, MOST_BYTES, follow=True).decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
    return found


def _kept_as(name: str) -> str:
    # A stage has a config.json of its own.
    return f"checkpoint-{name}"


class Kept:
    """What a stage's oldest ancestor kept of the checkpoint that it was; nothing if it was none.

    Args:
        read: Text of a file that it keeps, by name; None if it keeps none.
    """

    def __init__(self, read: Callable[[str], str | None]) -> None:
        self._read = read

    def text(self, name: str) -> str | None:
        """Text of the checkpoint's file of this name."""
        return self._read(_kept_as(name))

    @property
    def config(self) -> Mapping[str, Any]:
        """The checkpoint's ``config.json``; empty if there was none."""
        text = self.text(CONFIG)
        return {} if text is None else parse_object(text, Path(CONFIG))

    @property
    def license(self) -> str | None:
        """The licence that its card names in its header."""
        header = (self.text(CARD) or "").split("\n---", 1)[0]
        found = _LICENSE_KEY.search(header) if header.startswith("---") else None
        return found[1] if found else None

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text where others generate, as its files say; the run's own begin the next one."""
        text = self.text(GENERATION_CONFIG)
        found = (self.config if text is None else parse_object(text, Path(GENERATION_CONFIG))).get("eos_token_id")
        return frozenset(one for one in (found if isinstance(found, list) else [found]) if isinstance(one, int))

    def going_out(self) -> dict[str, str]:
        """Texts of :data:`OUT` that were kept, by file name."""
        return {name: text for name in OUT if (text := self.text(name)) is not None}
