"""Directories that exist whole or not at all, whatever kills the process."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lifelong_moe.errors import CorruptError, ResourceError, disk_is_full
from lifelong_moe.storage.files import rename, sync
from lifelong_moe.storage.keys import canonical_json, file_sha256
from lifelong_moe.storage.temporary import temporary

MANIFEST = "manifest.json"


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield a folder to fill with files, which in the end becomes ``target``.

    Everything is flushed to disk before the rename, and the rename after it. If ``target`` is there by then, another
    process was first with the same content address: its version stays.

    Args:
        target: Directory to appear; its parents are made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary(target.parent) as work:
        yield work
        mode = work.stat().st_mode & 0o666
        for path in sorted(work.iterdir()):
            path.chmod(mode)  # safetensors writes for its owner alone; what is shared is for everyone that umask allows
            sync(path)
        sync(work)
        _publish(work, target)


def _publish(work: Path, target: Path) -> None:
    try:
        rename(work, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def write_directory(target: Path, files: Mapping[str, Callable[[Path], object]]) -> None:
    """Write files and a manifest of their hashes into a :func:`new_directory`.

    Args:
        target: Directory to appear; its parents are made.
        files: For each file name a function that writes it to the path it is given.

    Raises:
        ResourceError: If the disk is full; ``target`` is then untouched.
    """
    try:
        with new_directory(target) as work:
            for name, write in files.items():
                write(work / name)
            entries = {
                name: {"bytes": (work / name).stat().st_size, "sha256": file_sha256(work / name)} for name in files
            }
            (work / MANIFEST).write_text(canonical_json({"files": entries}), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        if disk_is_full(error):
            raise ResourceError(f"{target}: no space left on the disk; nothing committed was touched.") from error
        raise


def remove_directory(path: Path) -> None:
    """Remove a directory so that it is there whole or not at all: renamed first, and what a kill leaves is cleaned up
    like any half-written directory."""
    with temporary(path.parent) as work:
        rename(path, work / path.name)
        sync(path.parent)


def verify_directory(directory: Path) -> dict[str, Any]:
    """Check every file against the manifest.

    Returns:
        The manifest.

    Raises:
        CorruptError: Naming the file and both hashes, or what is missing.
    """
    manifest_path = directory / MANIFEST
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        entries = manifest["files"].items()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CorruptError(f"{manifest_path}: unreadable ({type(error).__name__}); the directory is damaged.") from None
    for name, entry in entries:
        path = directory / name
        if not path.is_file():
            raise CorruptError(f"{path}: missing, but the manifest lists it.")
        found = file_sha256(path)
        if found != entry["sha256"]:
            raise CorruptError(f"{path}: SHA-256 is {found}, but the manifest says {entry['sha256']}.")
    return manifest
