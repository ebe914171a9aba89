"""The inbox of scheduled retraining: a directory where documents arrive. It is only ever read.

With a ``manifest.json`` exactly the files that it lists are read, and each must have the size and hash it states:
``{"files": {"news.jsonl": {"bytes": 123, "sha256": "…"}}, "distribution": "news"}``. Without one every file of the
directory is read, in order of name; hidden files, ``*.tmp`` and ``*.part``, which somebody may still be writing, and
folders are passed over.

Other systems write here, so each file is opened once, below the directory that was opened at the beginning, and no
symbolic link is followed. What is parsed are the bytes that were hashed, whatever becomes of the file meanwhile.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any, cast

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.arrivals.inbox_rows import ReadFile, Row
from lifelong_moe.data.formats.bad_lines import BadLines
from lifelong_moe.data.formats.limits import MAX_INBOX_BYTES, MAX_INBOX_FILES, Portion, Quota
from lifelong_moe.data.formats.streams import OpenFile, decode, unpacked, unreadable
from lifelong_moe.data.formats.strict_json import parse_object
from lifelong_moe.data.text.documents import Document, normalized_hash
from lifelong_moe.data.text.files import Reader, reader_of
from lifelong_moe.errors import DataError, one_line
from lifelong_moe.storage.keys import content_key
from lifelong_moe.storage.modes import SHARED, as_private_as
from lifelong_moe.storage.opening import open_below, read_up_to
from lifelong_moe.storage.remembered import State, state_of

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
    mode: int = SHARED
    """Permissions of copies of their text: as private as each of the files."""


@dataclass(frozen=True)
class FileRead:
    """A file of the inbox that was read now, or that nothing has touched since it was."""

    name: str
    """Its path below the inbox."""
    found: dict[str, Any]
    """See :attr:`Inbox.files`."""
    state: State
    mode: int
    held_bytes: int
    documents: list[Document] | None
    """None if it was not read now."""
    before: ReadFile | None = None
    is_whole: bool = True
    """Whether its documents say all of it: no line was left out, and it is not packed beyond the usual ratio."""

    def rows(self) -> list[Row]:
        """Its documents, in their order."""
        if self.documents is None:
            assert self.before is not None
            return self.before.rows()
        digests = (bytes.fromhex(normalized_hash(document.text)[:32]) for document in self.documents)
        return [Row(one.hash, same, one.source) for one, same in zip(self.documents, digests, strict=True)]


@dataclass(frozen=True)
class Glance:
    """An inbox of which not each file was read."""

    files: list[FileRead]
    distribution: str | None
    bad_lines: BadLines | None = None
    """Lines that were left out."""

    @property
    def is_partial(self) -> bool:
        """Whether the text of some files is not there."""
        return any(file.documents is None for file in self.files)

    def inbox(self) -> Inbox | None:
        """All of it; None if no file holds a document."""
        assert not self.is_partial
        documents = [document for file in self.files for document in file.documents or ()]
        mode = reduce(and_, (file.mode for file in self.files), SHARED)
        return Inbox(documents, [file.found for file in self.files], self.distribution, mode) if documents else None


@dataclass(frozen=True)
class Arrived:
    """Which files lie in an inbox, without their content."""

    number: int
    state: str
    """SHA-256 of their names, devices, inodes, sizes and times; other files, or the same ones changed, have another."""
    changed_ns: int
    """Latest time at which one of them changed, in nanoseconds since the epoch."""
    looked_ns: int
    """When they were looked at, which was before they were read."""


def look_at_inbox(directory: Path) -> Arrived | None:
    """Look which files :func:`read_inbox` would read; None if it would not read all that there is.

    Raises:
        DataError: The manifest is malformed, or there are too many files.
    """
    with _opened(directory) as folder:
        return Arrived(0, content_key([]), 0, time.time_ns()) if folder is None else _Arrivals(directory, folder).look()


def read_inbox(directory: Path, source: SourceConfig, bad_lines: BadLines | None = None) -> Inbox | None:
    """Read everything that has arrived; None if nothing has. Arguments and errors as for :func:`glance_at_inbox`."""
    return glance_at_inbox(directory, source, bad_lines, {}).inbox()


def glance_at_inbox(
    directory: Path, source: SourceConfig, bad_lines: BadLines | None, before: Mapping[str, ReadFile]
) -> Glance:
    """Read what has arrived since an earlier glance.

    Args:
        directory: The inbox; an absent one is empty. It may be a symbolic link itself.
        source: ``text_field`` and ``source_field``.
        bad_lines: Takes lines of JSONL files that hold no document; None: the first of them is an error.
        before: Files as they were read then, by their path below the inbox, with the same ``source``.

    Raises:
        DataError: ``file:line: reason``; a file is not what the manifest says, or not one that may be read.
    """
    with _opened(directory) as folder:
        return (
            Glance([], None, bad_lines)
            if folder is None
            else _Arrivals(directory, folder).read(source, bad_lines, before)
        )


@contextmanager
def _opened(directory: Path) -> Iterator[int | None]:
    """A descriptor of the inbox; None if there is none."""
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    except NotADirectoryError:
        raise DataError(f"{directory}: the inbox must be a directory.") from None
    except OSError as error:
        raise unreadable(directory, error) from error
    except ValueError as error:  # NUL, or what is no text
        raise DataError(f"{directory}: {error}.") from error
    try:
        yield folder
    finally:
        os.close(folder)


class _Arrivals:
    """An open inbox; everything is found by its descriptor, not by its name."""

    def __init__(self, directory: Path, folder: int) -> None:
        self._directory, self._folder = directory, folder
        self._manifest = directory / MANIFEST
        self._quota = Quota(MAX_INBOX_BYTES, "the inbox")

    def read(self, source: SourceConfig, bad_lines: BadLines | None, before: Mapping[str, ReadFile]) -> Glance:
        """Read the files that are listed, or all of them, but for those that nothing has touched."""
        names = self._names()
        # A dangling link counts as a manifest: ignoring it would read files that nobody listed.
        if MANIFEST in names:
            listed, distribution = self._listed()
            entries = [(self._contained(name), entry) for name, entry in listed.items()]
        else:
            distribution, entries = None, [(Path(name), {}) for name in names]
        # Every file's kind is checked before the first is read, which may take minutes.
        readers = [reader_of(self._directory / path) for path, _ in entries]
        files = []
        for (path, entry), reader in zip(entries, readers, strict=True):
            file = self._untouched(path, before[str(path)], entry) if str(path) in before else None
            files.append(file or self._file(path, entry, reader, source, bad_lines))
        return Glance(files, distribution, bad_lines)

    def _untouched(self, path: Path, before: ReadFile, entry: Mapping[str, Any]) -> FileRead | None:
        """A file that was read before; None if it is another one now."""
        shown = self._directory / path
        try:
            with open_below(self._folder, path) as file:
                state, mode = state_of(file), as_private_as(os.fstat(file.fileno()).st_mode)
        except OSError as error:
            raise unreadable(shown, error) from error
        if state != before.state:
            return None
        found = {"name": one_line(path.name), "bytes": before.bytes, "sha256": before.sha256}
        _require_as_listed(shown, found, entry)
        # It counts against the inbox's limit like any other.
        Portion(shown, before.bytes, self._quota).hold(before.held_bytes)
        return FileRead(str(path), found, state, mode, before.held_bytes, None, before)

    def _file(
        self, path: Path, entry: Mapping[str, Any], reader: Reader, source: SourceConfig, bad_lines: BadLines | None
    ) -> FileRead:
        """Read a file."""
        file, found, state = self._snapshot(path, MAX_INBOX_BYTES)
        _require_as_listed(file.path, found, entry)
        held, excess, bad = self._counted(bad_lines)
        documents = list(reader(replace(file, bad_lines=bad_lines), source))
        held_now, *now = self._counted(bad_lines)
        return FileRead(str(path), found, state, file.mode, held_now - held, documents, None, now == [excess, bad])

    def _counted(self, bad_lines: BadLines | None) -> tuple[int, int, int]:
        return self._quota.num_bytes, self._quota.excess_bytes, len(bad_lines.found) if bad_lines else 0

    def look(self) -> Arrived | None:
        """The files that :meth:`read` would read, and the manifest; None if one of them cannot be looked at."""
        names, now = self._names(), time.time_ns()
        if MANIFEST in names:
            names = [MANIFEST, *(str(self._contained(name)) for name in self._listed()[0])]
        try:
            found = [os.stat(name, dir_fd=self._folder, follow_symlinks=False) for name in names]
        except OSError:
            return None
        kept = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
        states = [
            [os.fsencode(name).hex(), *(getattr(one, field) for field in kept)]
            for name, one in zip(names, found, strict=True)
        ]
        return Arrived(len(names), content_key(states), max((one.st_ctime_ns for one in found), default=0), now)

    def _names(self) -> list[str]:
        """Files in order of name, without those that are passed over."""
        names = []
        with os.scandir(self._folder) as entries:
            for number, entry in enumerate(entries):
                if number == MAX_INBOX_FILES:
                    raise DataError(f"{self._directory}: the inbox may hold {MAX_INBOX_FILES:,} files; there are more.")
                # A link to a folder is no folder: it is not followed, and so an error when it is opened.
                is_ready = not entry.name.startswith(".") and not entry.name.endswith(UNFINISHED)
                if entry.name == MANIFEST or (is_ready and not entry.is_dir(follow_symlinks=False)):
                    names.append(entry.name)
        return sorted(names)

    def _contained(self, name: str) -> Path:
        """The path of a listed file, which must lie in the inbox."""
        given = Path(name)
        try:
            can_be_name = os.fsencode(name) and "\0" not in name
        # A lone surrogate, which JSON can write and no file system can hold.
        except UnicodeEncodeError:
            can_be_name = False
        if given.is_absolute() or ".." in given.parts or not given.parts or not can_be_name:
            raise DataError(f'{self._manifest}: "{name}" must be a path below the inbox, without "..".')
        return given

    def _snapshot(self, path: Path, most_bytes: int) -> tuple[OpenFile, dict[str, Any], State]:
        """A file as it is now, its record (``name``, ``bytes`` and ``sha256``), and what it was before it was read."""
        shown = self._directory / path
        try:
            with open_below(self._folder, path) as file:
                stat, state = os.fstat(file.fileno()), state_of(file)
                # By its size first, so that a file of any size takes no memory.
                is_too_large = stat.st_size > most_bytes
                # Into memory: a writer who kept the file open could change it between hashing and parsing.
                data = b"" if is_too_large else read_up_to(file, most_bytes)
        except OSError as error:
            raise unreadable(shown, error) from error
        if is_too_large or len(data) > most_bytes:
            raise DataError(f"{shown}: over {most_bytes >> 20} MiB.")
        # Made printable: names go into records and messages.
        found = {"name": one_line(path.name), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        stream = io.BufferedReader(cast(Any, io.BytesIO(data)))
        portion = Portion(shown, len(data), self._quota)
        return OpenFile(shown, stream, portion, as_private_as(stat.st_mode)), found, state

    def _listed(self) -> tuple[dict[str, dict[str, Any]], str | None]:
        """The manifest's entries by name, and the name that it gives to their distribution."""
        manifest = self._manifest
        file, *_ = self._snapshot(Path(MANIFEST), MAX_MANIFEST_BYTES)
        data = unpacked(file).read()
        content = parse_object(decode(data, str(manifest)), manifest)
        files, distribution = content.get("files"), content.get("distribution")
        if unknown := sorted(set(content) - {"files", "distribution"}):
            raise DataError(f'{manifest}: key "{unknown[0]}" is unknown; there are files and distribution.')
        if not isinstance(files, dict) or not files:
            raise DataError(f'{manifest}: "files" must be an object with an entry for each file.')
        for name, entry in files.items():
            is_entry = isinstance(entry, dict) and isinstance(entry.get("bytes"), int)
            if not is_entry or not _is_hash(entry.get("sha256")):
                raise DataError(f'{manifest}: "{name}" needs bytes (a number) and sha256 (64 hexadecimal digits).')
        if distribution is not None and not (isinstance(distribution, str) and DISTRIBUTION.fullmatch(distribution)):
            raise DataError(
                f"{manifest}: \"distribution\" may hold at most 40 letters, digits, '_', '-' and '.'; "
                f"got {distribution!r}."
            )
        return files, distribution


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _require_as_listed(path: Path, found: Mapping[str, Any], listed: Mapping[str, Any]) -> None:
    for key in ("bytes", "sha256"):
        if listed and found[key] != listed[key]:
            raise DataError(f"{path}: {key} is {found[key]}, but the manifest says {listed[key]}.")
