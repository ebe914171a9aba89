"""Directories and files that exist whole or not at all, whatever kills the process."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lifelong_moe.data.storage import sync, temporary, write_atomic
from lifelong_moe.errors import CorruptError, ResourceError, disk_is_full
from lifelong_moe.stages.keys import canonical_json, file_hash

MANIFEST = "manifest.json"


def write_directory(target: Path, files: Mapping[str, Callable[[Path], object]]) -> None:
    """Write files and their manifest to a temporary directory beside ``target``, then rename it.

    Everything is flushed to disk before the rename, and the rename after it. If ``target`` is there already, another
    process was first with the same content address: its version stays.

    Args:
        target: Directory to appear; its parents are made.
        files: For each file name a function that writes it to the path it is given.

    Raises:
        ResourceError: If the disk is full; ``target`` is then untouched.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary(target.parent) as tmp:
            _write_files(tmp, files)
            _publish(tmp, target)
    except (OSError, SafetensorError) as error:
        if disk_is_full(error):
            raise ResourceError(f"{target}: no space left on the disk; nothing committed was touched.") from error
        raise


def _write_files(tmp: Path, files: Mapping[str, Callable[[Path], object]]) -> None:
    for name, write in files.items():
        write(tmp / name)
        sync(tmp / name)
    entries = {name: {"bytes": (tmp / name).stat().st_size, "sha256": file_hash(tmp / name)} for name in files}
    (tmp / MANIFEST).write_text(canonical_json({"files": entries}))
    for name in files:  # safetensors writes for its owner alone; what is shared is for everyone that umask allows
        (tmp / name).chmod((tmp / MANIFEST).stat().st_mode)
    sync(tmp / MANIFEST)
    sync(tmp)


def _publish(tmp: Path, target: Path) -> None:
    try:
        os.rename(tmp, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    sync(target.parent)


def remove_directory(path: Path) -> None:
    """Remove a directory so that it is there whole or not at all: renamed first, and what a kill leaves is cleaned up
    like any half-written directory."""
    with temporary(path.parent) as tmp:
        os.rename(path, tmp / path.name)
        sync(path.parent)


def replace_file(path: Path, text: str) -> None:
    """Replace a file's content atomically and durably."""
    write_atomic(path, text.encode("utf-8"))


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
        found = file_hash(path)
        if found != entry["sha256"]:
            raise CorruptError(f"{path}: SHA-256 is {found}, but the manifest says {entry['sha256']}.")
    return manifest
