"""The inbox of scheduled retraining: a directory where documents arrive. It is only ever read.

With a ``manifest.json`` exactly the files that it lists are read, and each must have the size and hash it states:
``{"files": {"news.jsonl": {"bytes": 123, "sha256": "…"}}, "distribution": "news"}``. Without one every file of the
directory is read, in order of name; hidden files, ``*.tmp`` and ``*.part``, which somebody may still be writing, and
folders are passed over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.text.files import reader_of
from lifelong_moe.data.text.streams import decode, open_bytes, require_regular
from lifelong_moe.data.text.strict_json import parse_object
from lifelong_moe.errors import DataError, one_line
from lifelong_moe.storage.keys import file_sha256

MANIFEST = "manifest.json"
# Room for about a hundred thousand files; the manifest is parsed whole in memory.
MAX_MANIFEST_BYTES = 16 << 20
UNFINISHED = (".tmp", ".part")
DISTRIBUTION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")


@dataclass(frozen=True)
class Inbox:
    """What has arrived."""

    documents: list[Document]
    files: list[dict[str, Any]]
    """``name``, ``bytes`` and ``sha256`` of each file read."""
    distribution: str | None
    """Name that the manifest gives them."""


def read_inbox(directory: Path, source: SourceConfig) -> Inbox | None:
    """Read everything that has arrived; None if nothing has.

    Args:
        directory: The inbox; an absent one is empty.
        source: ``text_field`` and ``source_field``.

    Raises:
        DataError: ``file:line: reason``; a file is not what the manifest says, or not one that may be read.
    """
    if not directory.exists():
        return None
    if not directory.is_dir():
        raise DataError(f"{directory}: the inbox must be a directory.")
    manifest = directory / MANIFEST
    # A dangling link counts as a manifest: ignoring it would read files that nobody listed.
    listed, distribution = _listed(manifest) if manifest.exists() or manifest.is_symlink() else (None, None)
    paths = _present(directory) if listed is None else [_contained(directory, name, manifest) for name in listed]
    readers = [(path, reader_of(path)) for path in paths]
    # Hashed before reading, and names made printable: they go into records and messages.
    files = [{"name": one_line(path.name), "bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths]
    # All files are compared with the manifest before any is parsed: half an inbox is never learned.
    for path, file in zip(paths, files, strict=True):
        _require_as_listed(path, file, (listed or {}).get(str(path.relative_to(directory))))
    documents = [document for path, reader in readers for document in reader(path, source)]
    return Inbox(documents, files, distribution) if documents else None


def _present(directory: Path) -> list[Path]:
    """Files in order of name; what is no regular file is an error before anything is opened."""
    paths = [
        path
        for path in sorted(directory.iterdir())
        if not path.name.startswith(".") and path.suffix not in UNFINISHED and not path.is_dir()
    ]
    for path in paths:
        _require_inside(directory, path)
        require_regular(path)
    return paths


def _listed(manifest: Path) -> tuple[dict[str, dict[str, Any]], str | None]:
    with open_bytes(manifest) as stream:
        data = stream.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise DataError(f"{manifest}: over {MAX_MANIFEST_BYTES >> 20} MiB.")
    content = parse_object(decode(data, str(manifest)), manifest)
    files, distribution = content.get("files"), content.get("distribution")
    if unknown := sorted(set(content) - {"files", "distribution"}):
        raise DataError(f'{manifest}: key "{unknown[0]}" is unknown; there are files and distribution.')
    if not isinstance(files, dict) or not files:
        raise DataError(f'{manifest}: "files" must be an object with an entry for each file.')
    for name, entry in files.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int) or not _is_hash(entry.get("sha256")):
            raise DataError(f'{manifest}: "{name}" needs bytes (a number) and sha256 (64 hexadecimal digits).')
    if distribution is not None and not (isinstance(distribution, str) and DISTRIBUTION.fullmatch(distribution)):
        raise DataError(
            f"{manifest}: \"distribution\" may hold at most 40 letters, digits, '_', '-' and '.'; got {distribution!r}."
        )
    return files, distribution


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _contained(directory: Path, name: str, manifest: Path) -> Path:
    """The path of a listed file, which must lie in the inbox, also behind symbolic links."""
    given = Path(name)
    if given.is_absolute() or ".." in given.parts or not given.parts or "\0" in name:
        raise DataError(f'{manifest}: "{name}" must be a path below the inbox, without "..".')
    path = directory / given
    _require_inside(directory, path)
    require_regular(path)
    return path


def _require_inside(directory: Path, path: Path) -> None:
    # Resolved, because a link in the inbox could name any file that this user may read.
    if not path.resolve().is_relative_to(directory.resolve()):
        raise DataError(f"{path}: leads out of the inbox; only files in it are read.")


def _require_as_listed(path: Path, found: dict[str, Any], listed: dict[str, Any] | None) -> None:
    for key in ("bytes", "sha256"):
        if listed is not None and found[key] != listed[key]:
            raise DataError(f"{path}: {key} is {found[key]}, but the manifest says {listed[key]}.")
