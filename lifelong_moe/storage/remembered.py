"""Remember which files were verified, so that gigabytes are not read again while nothing has touched them.

A store keeps this itself, though somebody else may have made the store, and nothing here is signed. Why that is safe:

- A note holds for one file: its device, inode, size and times to the nanosecond, that of its last change among them,
  which no program can set. A copy of a store, an archive or a download gives its files other inodes and times, so
  notes that come along say nothing, and what a copy has damaged is found.
- Who hands over the files themselves, on a disk that is shared, in an image, by a server, can forge a note. They can as
  well make the manifest fit their files: its hashes guard against damage, not against people. Where a manifest is held
  to something from outside of the store, a public key or a pointer to a stage, no note is asked
  (:class:`~lifelong_moe.store.stages.StageStore`).
- A file that is written to after it was read has a later time of change, unless the clock that file systems go by has
  not moved on: so what changed within the last seconds is not noted.

Not noticed is what changes without the file system's knowledge: a medium that loses bits, or whoever writes to the raw
device. ``lifelong-moe status --verify`` reads everything.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.grammars import FileName, Sha256
from lifelong_moe.storage.keys import canonical_json
from lifelong_moe.storage.plain import from_plain
from lifelong_moe.storage.stored import read_stored

State = tuple[int, ...]
"""What changes if a file is written or replaced: device, inode, size, and times of the last writing and change."""
VERIFIED = "verified"
"""Folder of a store with the notes on its stages."""
LEAST_BYTES = 1 << 20
"""Smaller files are hashed each time, which costs no more than to remember them."""
SETTLED_SECONDS = 10.0
"""Age of a file's last change from which on a further one has another time, also where times are kept in seconds."""


def state_of(file: BinaryIO) -> State:
    """An open file as the file system describes it."""
    stat = os.fstat(file.fileno())
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@dataclass(frozen=True)
class Seen:
    """A file as it was when its hash was computed."""

    state: State
    sha256: Sha256


@dataclass(frozen=True)
class _Notes:
    files: Mapping[FileName, Seen] = field(default_factory=dict)


class Remembered:
    """What is known of the files of one directory.

    Args:
        path: File that holds it; absent or damaged, nothing is known.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._new = path, dict[str, Seen]()
        self._known: Mapping[str, Seen] = {}
        with suppress(OSError, CorruptError):
            self._known = read_stored(path, partial(from_plain, _Notes)).files

    def knows(self, name: str, seen: Seen) -> bool:
        """Whether the file had this hash, and nothing has touched it since."""
        return self._known.get(name) == seen

    def note(self, name: str, seen: Seen) -> None:
        """Note that a file has a hash; it is kept by :meth:`save`."""
        *_, size, _, changed = seen.state
        if size >= LEAST_BYTES and changed < (time.time() - SETTLED_SECONDS) * 1e9:
            self._new[name] = seen

    def save(self) -> None:
        """Keep what was noted; a store that cannot be written to is read again the next time."""
        if self._new:
            with suppress(OSError):
                write_atomic(self._path, canonical_json(asdict(_Notes({**self._known, **self._new}))))
