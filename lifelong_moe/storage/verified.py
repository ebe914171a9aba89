"""Read the files of a directory whose manifest lists their hashes: exactly the bytes that were compared with it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.grammars import FileName, Sha256
from lifelong_moe.storage.opening import open_regular, read_bounded
from lifelong_moe.storage.plain import PlainError, from_plain
from lifelong_moe.storage.plain_files import corrupt_if_irregular
from lifelong_moe.storage.remembered import Remembered, Seen, State, state_of
from lifelong_moe.storage.stored import MOST_BYTES, read_stored

MANIFEST = "manifest.json"
_DESCRIPTORS = Path("/proc/self/fd")
"""Where Linux shows what this process has opened."""


@dataclass(frozen=True)
class Entry:
    """A file in a manifest."""

    bytes: int
    sha256: Sha256


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest."""

    files: Mapping[FileName, Entry]

    def __post_init__(self) -> None:
        # Without any file there would be nothing that could be wrong.
        if not self.files:
            raise PlainError("lists no file", ".files")


@dataclass(frozen=True)
class VerifiedDirectory:
    """A directory that holds exactly the files of its manifest, with the hashes that it lists."""

    path: Path
    manifest: Manifest
    states: Mapping[str, State]
    """Of each file when it was hashed."""
    follow: bool = False
    """Whether a file may be a symbolic link, as in a folder that the user names."""
    lister: str = "the manifest"
    """What lists the files, for messages."""

    def require(self, *names: str) -> None:
        """Require files of these names.

        Raises:
            CorruptError: If the manifest does not list one.
        """
        for name in names:
            if name not in self.manifest.files:
                raise CorruptError(f"{self.path / MANIFEST}: lists no {name}.")

    @contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        """Yield a path at which the verified bytes of a file are, whatever stands behind its name by now.

        Raises:
            CorruptError: If the file is gone or another one, or is written to meanwhile.
        """
        self.require(name)
        path = self.path / name
        with _open(path, self.lister, follow=self.follow) as file:
            state = state_of(file)
            if state != self.states.get(name):
                _compare(path, file, self.manifest.files[name], self.lister)
            # Opened by its descriptor: a name may lead elsewhere a moment later.
            yield _DESCRIPTORS / str(file.fileno()) if _DESCRIPTORS.is_dir() else path
            # Written to meanwhile; or only renamed or linked, which changes a time as well.
            if state_of(file) != state:
                file.seek(0)
                _compare(path, file, self.manifest.files[name], self.lister)

    def read(self, name: str) -> bytes:
        """The bytes of a small file; errors as for :meth:`opened`, and if it is no small one."""
        with self.opened(name) as path, corrupt_if_irregular(self.path / name):
            return read_bounded(path, MOST_BYTES, follow=True)  # a descriptor's name is a link


def read_manifest(directory: Path) -> Manifest:
    """Read a directory's manifest.

    Raises:
        CorruptError: If it is absent or damaged.
    """
    path = directory / MANIFEST
    try:
        return read_stored(path, partial(from_plain, Manifest))
    except FileNotFoundError:
        raise CorruptError(f"{path}: missing; the directory is damaged.") from None


def verify_directory(directory: Path, remembered: Remembered | None = None) -> VerifiedDirectory:
    """Check every file against the manifest.

    Args:
        directory: The directory.
        remembered: What was verified before and need not be read again; None reads everything.

    Raises:
        CorruptError: If a file is missing, is not listed, or its hash differs; names the file and both hashes.
    """
    manifest, states = read_manifest(directory), {}
    for name, entry in manifest.files.items():
        path = directory / name
        with _open(path) as file:
            states[name] = state_of(file)
            seen = Seen(states[name], entry.sha256)
            if remembered is not None and remembered.knows(name, seen):
                continue
            _compare(path, file, entry)
            if remembered is not None:
                remembered.note(name, seen)
    for name in sorted(set(os.listdir(directory)) - {MANIFEST, *manifest.files}):
        raise CorruptError(f"{directory / name}: not in the directory's manifest.")
    if remembered is not None:
        remembered.save()
    return VerifiedDirectory(directory, manifest, states)


def verify_files(directory: Path, files: Mapping[str, Entry], lister: str) -> VerifiedDirectory:
    """Check files of a folder of the user's, which may hold others besides and whose files may be links.

    Args:
        directory: The folder.
        files: What each has to be.
        lister: What says so, for messages.

    Raises:
        CorruptError: If a file is missing or differs; names it and both hashes.
    """
    states = {}
    for name, entry in files.items():
        with _open(directory / name, lister, follow=True) as file:
            states[name] = state_of(file)
            _compare(directory / name, file, entry, lister)
    return VerifiedDirectory(directory, Manifest(files), states, follow=True, lister=lister)


def _open(path: Path, lister: str = "the manifest", *, follow: bool = False) -> BinaryIO:
    try:
        with corrupt_if_irregular(path):
            return open_regular(path, follow=follow)
    except FileNotFoundError:
        raise CorruptError(f"{path}: missing, but {lister} lists it.") from None


def _compare(path: Path, file: BinaryIO, entry: Entry, lister: str = "the manifest") -> None:
    # Size before hash: what is too long or too short is refused without reading gigabytes.
    if (size := os.fstat(file.fileno()).st_size) != entry.bytes:
        raise CorruptError(f"{path}: {size} bytes, but {lister} says {entry.bytes}.")
    found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    if found != entry.sha256:
        raise CorruptError(f"{path}: SHA-256 is {found}, but {lister} says {entry.sha256}.")
