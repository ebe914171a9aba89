"""How much text is read at most: a line, a document, a file, and all files that are read together.

A small compressed file must not become an endless one, and neither must two hundred of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lifelong_moe.errors import DataError

MAX_LINE_BYTES = 16 << 20
"""Longest JSONL line, and longest text of a Parquet file."""
MAX_TEXT_FILE_BYTES = 256 << 20
"""Longest ``.txt`` file, or other text; it is one document."""
MAX_HTML_BYTES = 16 << 20
"""Longest HTML page: its tags are read one by one, which takes a second a MiB."""
MAX_SOURCE_FILES = 1_000_000
"""Most files of a distribution; a pattern such as ``/**`` would list a whole disk."""
MAX_RATIO = 200
"""Highest ratio of unpacked to packed bytes; text reaches about 20. Applies beyond :data:`ALLOWANCE_BYTES`."""
ALLOWANCE_BYTES = 64 << 20
"""Most bytes of files beyond the ratio, of all that are read together: tiny files may compress well."""
MAX_SOURCE_BYTES = 64 << 30
"""Most bytes of a distribution's files, unpacked; as much of the disk is taken while they are read."""
MAX_INBOX_BYTES = 4 << 30
"""Most bytes of the inbox's files, packed or unpacked, and so of a batch."""
MAX_INBOX_FILES = 100_000
"""Most files and folders in the inbox, hidden ones included."""
DOCUMENT_BYTES = 400
"""What a document counts besides its text: about what Python takes for it, since a billion tiny ones are large, too."""


@dataclass
class Quota:
    """What is left of the limits for files that are read together."""

    most_bytes: int = MAX_SOURCE_BYTES
    what: str = "the files of a distribution"
    """Name of the files, for messages."""
    num_bytes: int = field(default=0, init=False)
    """Unpacked so far."""
    excess_bytes: int = field(default=0, init=False)
    """Unpacked so far from files that are beyond the ratio."""


@dataclass
class Portion:
    """A file's share of a quota."""

    path: Path
    """For messages."""
    packed_bytes: int
    """Size of the file."""
    quota: Quota
    _num_bytes: int = field(default=0, init=False)

    def take(self, num_bytes: int) -> None:
        """Count bytes that were unpacked.

        Raises:
            DataError: They are more than the limits allow.
        """
        before = self._excess()
        self._num_bytes += num_bytes
        self.quota.excess_bytes += self._excess() - before
        if self.quota.excess_bytes > ALLOWANCE_BYTES:
            raise DataError(
                f"{self.path}: unpacks to more than {MAX_RATIO} times its size, which no text does"
                f"{'' if self._excess() > ALLOWANCE_BYTES else ', as other files before it do'}."
            )
        self.hold(num_bytes)

    def hold(self, num_bytes: int = DOCUMENT_BYTES) -> None:
        """Count bytes that are held in memory, by default those of a document besides its text.

        Raises:
            DataError: They are more than the limits allow.
        """
        self.quota.num_bytes += num_bytes
        if self.quota.num_bytes > self.quota.most_bytes:
            most = f"{self.quota.most_bytes >> 30} GiB" if self.quota.most_bytes >> 30 else f"{self.quota.most_bytes} B"
            raise DataError(f"{self.path}: {self.quota.what} may hold {most} of documents together; this is beyond.")

    def _excess(self) -> int:
        return self._num_bytes if self._num_bytes > MAX_RATIO * self.packed_bytes else 0
