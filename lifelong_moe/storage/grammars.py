"""What a stored text may be: types such as :data:`Key`, which :func:`~lifelong_moe.storage.plain.from_plain` checks.

Names and keys become parts of paths, so a text of another form could lead anywhere. Each grammar is that of what we
write: no separators, no leading dots.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Grammar:
    """The form of a text."""

    pattern: re.Pattern[str]
    """Of the whole text."""
    words: str
    """The same for people, such as ``64 hexadecimal digits``."""

    def allows(self, text: str) -> bool:
        """Whether a text has this form."""
        return self.pattern.fullmatch(text) is not None


def _grammar(pattern: str, words: str) -> Grammar:
    return Grammar(re.compile(pattern, re.ASCII), words)


# Longer than what a configuration may name, since stages that are made of others carry on: `fruit.consolidated1`.
NAME = _grammar(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", "a name of letters, digits, '_', '-' and '.'")
SHA256 = _grammar(r"[0-9a-f]{64}", "64 hexadecimal digits")

Name = Annotated[str, NAME]
"""Of a run, a stage, a distribution, a method or a router."""
FileName = Annotated[str, NAME]
"""Of a file within its folder."""
Sha256 = Annotated[str, SHA256]
"""Hash of text or of a file."""
Key = Annotated[str, SHA256]
"""Content address of a stage, of data or of a measurement."""
Prefix = Annotated[str, _grammar(r"[0-9a-f]{1,64}", "hexadecimal digits")]
"""The first digits of a hash."""
RunId = Annotated[str, _grammar(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}", "the id of an MLflow run")]
"""As MLflow's servers give them out."""
