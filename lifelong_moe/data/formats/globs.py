"""Globs that enter each folder once, whatever links there are: those of the standard library walk round a link to a
folder above forty times, and with two of them in one folder, 2 to the power of forty times."""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

ANY_DEPTH = "**"


def matching(pattern: str) -> Iterator[str]:
    """Paths that match, as by :func:`glob.iglob` with ``recursive=True``, in no particular order.

    Of several ways to a folder, ``**`` takes the one through the fewest folders, and of those the first by name.
    """
    parts = pattern.split(os.sep)
    if ANY_DEPTH not in parts:
        yield from glob.iglob(pattern)
        return
    first = parts.index(ANY_DEPTH)
    # Several in a row are as one; the last one stands for whatever is below.
    rest = deque(parts[first + 1 :])
    while rest and rest[0] in (ANY_DEPTH, ""):
        rest.popleft()
    tail = os.sep.join(rest) or "*"
    above = os.sep.join(parts[:first])
    # Of "/**" nothing is left before the stars, of "**" it is the current directory.
    above += os.sep if first == 1 and not parts[0] else ""
    for base in glob.iglob(above) if glob.has_magic(above) else [above]:
        for folder in _folders(base):
            yield from matching(os.path.join(glob.escape(folder), tail))


def _folders(base: str) -> Iterator[str]:
    """A folder and all below it but hidden ones, the nearest first; each once, by the first way that leads to it."""
    known: set[tuple[int, int]] = set()
    queue = deque([base])
    while queue:
        folder = queue.popleft()
        # What cannot be entered has nothing that could be read.
        with suppress(OSError):
            status = os.stat(folder or os.curdir)
            if (identity := (status.st_dev, status.st_ino)) in known:
                continue
            known.add(identity)
            with os.scandir(folder or os.curdir) as entries:
                below = sorted(entry.name for entry in entries if entry.name[0] != "." and _is_folder(entry))
            yield folder
            queue.extend(os.path.join(folder, name) for name in below)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):
        return entry.is_dir()
    return False
