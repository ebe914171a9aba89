"""Permissions of what is written: it may be somebody's text, so others never read it, whatever the umask allows."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

SHARED = 0o640
"""Widest permissions of a file; the umask may narrow them. A store may be shared by reading, within a group."""
PRIVATE = 0o600
"""Permissions of a file of text whose source is not known any more."""


def as_private_as(mode: int) -> int:
    """Permissions of a file that is made from another one of permissions ``mode``; we ourselves may always write it."""
    return PRIVATE | mode & SHARED


def folder_mode(mode: int) -> int:
    """Permissions of a folder of files of permissions ``mode``: whoever may read them may enter."""
    return mode | 0o100 | (mode & 0o040) >> 2


def make_folder(path: Path) -> None:
    """Make a folder and its parents where they are missing; whoever may read files may enter them."""
    if path.is_dir():
        return
    make_folder(path.parent)
    # Another process may be first; what is there and no folder shows when it is written to.
    with suppress(FileExistsError):
        path.mkdir(mode=folder_mode(SHARED))
