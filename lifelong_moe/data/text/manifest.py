"""Remember what became of a distribution's files, so that nothing is read twice while no file has changed.

``cache/manifests/<key>.json`` is named by a distribution's configuration. It says which files there were, as the file
system describes them, their SHA-256, and what came of them: hashes and numbers, no text. Another file, named by all
distributions that are read together, says what is left of each without near copies of held-out text.

A manifest decides nothing but whether files are read. Its paths are compared with those that the configuration names,
and none is opened: so one that somebody else made leads nowhere, and what it says of a file holds only for the device,
inode, size and times that no copy keeps. It can be forged by who can write to the cache, as tokens there can; what it
says of text is compared with the text once that is read after all, and a manifest that is wrong is forgotten.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.formats.outcomes import FileOutcome
from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.grammars import Sha256
from lifelong_moe.storage.keys import SHORT, canonical_json, content_key
from lifelong_moe.storage.modes import SHARED, as_private_as
from lifelong_moe.storage.opening import open_regular
from lifelong_moe.storage.plain import from_plain
from lifelong_moe.storage.remembered import SETTLED_SECONDS, State, state_of
from lifelong_moe.storage.stored import read_stored

VERSION = 1
"""Raised whenever the same files would give other documents, another split or other near copies."""
FOLDER = "manifests"
ROWS = ".rows"
"""Ending of what is remembered of a single file; see :mod:`lifelong_moe.data.text.file_rows`."""
HASHES = ".hashes"
"""Ending of an index of hashes beside the manifests; see :mod:`lifelong_moe.data.text.known_hashes`."""
UNREAD = "0" * 64
"""In place of the hash of what was not opened, such as a picture that a glob found."""
HASHED_BEFORE = 64 << 20
"""Largest file, in bytes, that is hashed before it is read, if it has just changed."""
T = TypeVar("T")


@dataclass(frozen=True)
class SeenFile:
    """A file as it was when it was read."""

    state: State
    """Device, inode, size, and times of the last writing and change; empty if it had only just been written."""
    sha256: Sha256


@dataclass(frozen=True)
class PartSummary:
    """One side of a split."""

    hash: Sha256
    documents: int
    bytes: int

    def __post_init__(self) -> None:
        # What is left of a distribution has at least one document on each side, and none is empty.
        if self.documents < 1 or self.bytes < self.documents:
            raise CorruptError("documents and bytes must be positive.")


@dataclass(frozen=True)
class SplitManifest:
    """What came of a distribution's files."""

    files: Mapping[str, SeenFile]
    """By path, as the configuration leads to it; none of a dataset of the hub, which its commit describes."""
    outcomes: tuple[FileOutcome, ...]
    train: PartSummary
    heldout: PartSummary
    heldout_rows: Sha256
    """Address of the held-out documents in a :class:`~lifelong_moe.data.tokens.records.HeldoutStore`."""
    duplicates: int


@dataclass(frozen=True)
class LeftManifest:
    """What is left of a distribution beside others, without near copies of their held-out text."""

    train: PartSummary
    near_copies: tuple[Sha256, ...]
    outcomes: tuple[FileOutcome, ...]


@dataclass(frozen=True)
class _Left:
    left: Mapping[str, LeftManifest] = field(default_factory=dict)


def split_manifest(
    config: SourceConfig, paths: Sequence[Path], cache: Path
) -> tuple[SplitManifest, int] | tuple[None, int]:
    """What came of a distribution's files, and permissions of what is made of them; None if one has changed.

    A file that was written to, moved or copied since is read to compare its hash, and nothing is parsed.

    Args:
        config: The distribution.
        paths: All files that it leads to now.
        cache: The ``data/cache/`` directory.
    """
    path = _path(cache, {"source": asdict(config)})
    known, mode = _read(path, partial(from_plain, SplitManifest)), SHARED
    if known is None or {str(one) for one in paths} != known.files.keys():
        return None, mode
    now: dict[str, SeenFile] = {}
    for one in paths:
        found, private = _as_known(one, known.files[str(one)])
        if found is None:
            return None, mode
        now[str(one)], mode = found, mode & private
    if now != known.files:
        known = replace(known, files=now)
        write_split(config, known, cache, mode)
    return known, mode


def files_before(config: SourceConfig, cache: Path) -> Mapping[str, SeenFile]:
    """A distribution's files as they were when it was last read; none if that is not known."""
    known = _read(_path(cache, {"source": asdict(config)}), partial(from_plain, SplitManifest))
    return {} if known is None else known.files


def write_split(config: SourceConfig, found: SplitManifest, cache: Path, mode: int) -> None:
    """Remember what came of a distribution's files; a cache that cannot be written to forgets."""
    _write(_path(cache, {"source": asdict(config)}), asdict(found), mode)


def forget_split(config: SourceConfig, cache: Path) -> None:
    """Forget what came of a distribution's files, so that the next start reads them."""
    _remove(_path(cache, {"source": asdict(config)}))


def split_identity(config: SourceConfig, found: SplitManifest) -> str:
    """Names all that a split was made of, without the times of its files."""
    files = {path: seen.sha256 for path, seen in found.files.items()}
    return _key({"source": asdict(config), "files": files})


def files_state(files: Mapping[str, SeenFile]) -> str:
    """Names files by all that the file system says of them, which no copy has; empty where a change might not show."""
    # Of a dataset of the hub nothing here tells who has read it.
    if not files or any(not seen.state and seen.sha256 != UNREAD for seen in files.values()):
        return ""
    return _key({"files": {path: asdict(seen) for path, seen in files.items()}})


def file_state(path: Path) -> str:
    """:func:`files_state` of a file of our own, which is not read; empty if there is none, too."""
    with suppress(OSError), open_regular(path, follow=False) as file:
        if _is_settled(state := state_of(file)):
            return content_key(state)
    return ""


def left_manifest(asked: Mapping[str, object], cache: Path) -> Mapping[str, LeftManifest] | None:
    """What is left of distributions that are read together; None if that is not known.

    Args:
        asked: Plain data that says of each what it was made of.
        cache: The ``data/cache/`` directory.
    """
    found = _read(_path(cache, asked), partial(from_plain, _Left))
    return None if found is None else found.left


def write_left(asked: Mapping[str, object], left: Mapping[str, LeftManifest], cache: Path, mode: int) -> None:
    """Remember what is left of distributions; arguments as for :func:`left_manifest`."""
    _write(_path(cache, asked), asdict(_Left(left)), mode)


def forget_left(asked: Mapping[str, object], cache: Path) -> None:
    """Forget what is left of distributions; arguments as for :func:`left_manifest`."""
    _remove(_path(cache, asked))


def forget(cache: Path) -> None:
    """Remove all manifests, indices, rows and notes on tokens that were verified: every file is read again."""
    for pattern in (f"{FOLDER}/*.json", f"{FOLDER}/*{HASHES}", f"{FOLDER}/*{ROWS}", "tokens/*/verified.json"):
        for path in cache.glob(pattern):
            _remove(path)


@dataclass(frozen=True)
class Unread:
    """An open file before it is read."""

    state: State
    sha256: str | None
    """None unless a change might not show in the state; :data:`UNREAD` if it is not known."""


def unread_file(file: BufferedReader) -> Unread:
    """What tells whether a file changes while it is read; the file stays at its beginning."""
    state = state_of(file)
    if _is_settled(state):
        return Unread(state, None)
    # A large one is read anew at the next start, not twice now: it may be no text, and without end.
    return Unread(state, _sha256(file) if state[2] <= HASHED_BEFORE else UNREAD)


def read_file(file: BufferedReader, before: Unread) -> SeenFile | None:
    """A file that was read, with the hash of its bytes; None if that may not be the hash of what was read.

    Args:
        file: At any position; it is read again, from memory where it is small.
        before: As it was when it was opened.
    """
    if before.sha256 == UNREAD:
        return None
    digest = _sha256(file)
    if state_of(file) != before.state or before.sha256 not in (None, digest):
        return None
    return SeenFile(before.state if before.sha256 is None else (), digest)


def hashed_file(file: BufferedReader) -> SeenFile:
    """A file with the hash of its bytes, which is known to be of what it is read as."""
    state, digest = state_of(file), _sha256(file)
    return SeenFile(state if _is_settled(state) and state_of(file) == state else (), digest)


def _is_settled(state: State) -> bool:
    # Within the clock tick of its last change a file may change again and keep its times.
    return state[-1] < (time.time() - SETTLED_SECONDS) * 1e9


def _sha256(file: BufferedReader) -> str:
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    return digest


def seen_unread(path: Path, *, is_whole: bool) -> SeenFile:
    """What was found, but not opened: its kind, or with ``is_whole`` all that tells whether it is another file now."""
    try:
        found = path.stat()
    except OSError:  # a link that leads nowhere
        return SeenFile((), UNREAD)
    return SeenFile(_state(found) if is_whole else (stat.S_IFMT(found.st_mode),), UNREAD)


def _as_known(path: Path, known: SeenFile) -> tuple[SeenFile | None, int]:
    """The file if it holds what it did, and permissions of copies of it."""
    try:
        found = path.stat()
    except OSError:
        return (known if known == SeenFile((), UNREAD) else None), SHARED
    mode = as_private_as(found.st_mode)
    if known.state == _state(found):
        return known, mode
    if known.sha256 == UNREAD:
        return (known if known.state == (stat.S_IFMT(found.st_mode),) else None), mode
    # Written anew, or a copy: its bytes decide, unless its size tells already.
    if not stat.S_ISREG(found.st_mode) or known.state[2:3] not in ((), (found.st_size,)):
        return None, mode
    try:
        with open_regular(path, follow=True) as file:
            seen = hashed_file(file)
    except OSError:
        return None, mode
    return (seen if seen.sha256 == known.sha256 else None), mode


def _state(found: os.stat_result) -> State:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _key(asked: Mapping[str, object]) -> str:
    try:
        return content_key({"version": VERSION, **asked})
    except UnicodeEncodeError:  # a path of bytes that are no UTF-8
        return ""


def _path(cache: Path, asked: Mapping[str, object]) -> Path | None:
    key = _key(asked)
    return cache / FOLDER / f"{key[:SHORT]}.json" if key else None


def _read(path: Path | None, build: Callable[[Any], T]) -> T | None:
    if path is None:
        return None
    try:
        found = read_stored(path, lambda data: build(_whole(data)))
        # Garbage collection removes what nobody asked for in a long time.
        with suppress(OSError):
            os.utime(path)
        return found
    # Missing or damaged is the same: files are read, and it is made again.
    except (OSError, CorruptError):
        return None


def _whole(data: Any) -> Any:
    # One wrong digit would name a document that is no near copy, and nothing would show it.
    if not isinstance(data, dict) or data.pop("sha256", None) != content_key(data):
        raise CorruptError("damaged.")
    return data


def _remove(path: Path | None) -> None:
    with suppress(OSError):
        if path is not None:
            path.unlink()


def _write(path: Path | None, content: Mapping[str, object], mode: int) -> None:
    # Names that are no Unicode cannot be written; then files are read each time.
    with suppress(OSError, UnicodeEncodeError):
        if path is not None:
            write_atomic(path, canonical_json({**content, "sha256": content_key(content)}), mode)
