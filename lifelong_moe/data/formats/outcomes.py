"""What becomes of each file that a distribution names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from lifelong_moe.errors import DataError


class Outcome(StrEnum):
    """What became of a file."""

    used = "used"
    empty = "empty"
    too_short = "too short"
    too_long = "too long"
    duplicate = "duplicate"
    near_copy = "near copy of held-out text"
    beyond = "beyond max_bytes"
    other_encoding = "neither UTF-8 nor UTF-16"
    binary = "binary"
    unknown = "of a kind that is not read"


@dataclass(frozen=True, slots=True)
class FileOutcome:
    """A file, and what became of it."""

    file: str
    """As it was named, relative to the current directory or not."""
    outcome: Outcome
    documents: int = 0
    """Documents that it gave, before duplicates are dropped."""
    note: str = ""
    """More on it, such as the encoding that it was read by."""


class LeftOutError(DataError):
    """A file that gives no text. Where it was found with others it is left out and told; alone it is a mistake."""

    def __init__(self, message: str, outcome: Outcome = Outcome.unknown) -> None:
        super().__init__(message)
        self.outcome = outcome


def counted(files: Iterable[FileOutcome]) -> dict[str, int]:
    """How many files became what, in the order of :class:`Outcome`; without those that none became."""
    numbers = Counter(file.outcome for file in files)
    return {outcome.value: numbers[outcome] for outcome in Outcome if numbers[outcome]}


def sentence(files: Iterable[FileOutcome]) -> str:
    """``12 files: 9 used, 1 empty, 2 duplicate``."""
    numbers = counted(files)
    each = ", ".join(f"{number:,} {outcome}" for outcome, number in numbers.items())
    total = sum(numbers.values())
    return f"{total:,} {'file' if total == 1 else 'files'}: {each}"
