"""Lines of a JSONL file that hold no document, kept apart so that one of them does not stop a whole inbox."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from lifelong_moe.errors import DataError


@dataclass(frozen=True)
class BadLine:
    """A line that is no document."""

    file: str
    line: int
    """From 1."""
    reason: str
    text: str
    """Its text; bytes that are no UTF-8 are escaped."""


@dataclass
class BadLines:
    """Takes bad lines until they are too many, which suggests that a file is not what it is taken for."""

    most: int
    found: list[BadLine] = field(default_factory=list)

    def put(self, file: str, line: int, error: DataError, content: bytes) -> None:
        """Keep a line.

        Raises:
            DataError: The error of the line, if there are as many already.
        """
        if len(self.found) >= self.most:
            raise DataError(f"{error} inbox.max_bad_lines={self.most:,} lines are bad already.") from error
        reason = str(error).removeprefix(f"{file}:{line}: ")
        self.found.append(BadLine(file, line, reason, content.decode("utf-8", "backslashreplace").rstrip("\r\n")))

    def to_jsonl(self) -> str:
        """A line of JSON for each."""
        return "".join(json.dumps(asdict(one)) + "\n" for one in self.found)
