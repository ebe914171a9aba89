"""The spool: records that MLflow could not take yet, kept on disk until it can.

``mlruns/spool/<hash of the address>/`` holds ``address`` (the tracking URI as it may be shown, for people),
``pending.jsonl`` (one operation a line, appended by every process), ``taken-N.jsonl`` (lines that a delivery took from
there), ``refused.jsonl`` (operations that the store refused, with its reasons; for people) and ``files/`` (artifacts by
SHA-256).

Operations are idempotent and delivered in order, so a killed delivery is simply repeated.

A spool may come with somebody else's store. So it never says where it is delivered to: whoever delivers it names the
address, whose hash finds the folder; and of files, only those go that the spool holds, with the hash that names them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from lifelong_moe.errors import CorruptError, one_line
from lifelong_moe.redaction import is_web, shown_address, without_credentials
from lifelong_moe.storage.files import append_line, rename, write_atomic
from lifelong_moe.storage.keys import SHORT, text_sha256
from lifelong_moe.storage.locks import locked_when_free
from lifelong_moe.storage.opening import open_regular, read_bounded
from lifelong_moe.storage.stored import parse_json

log = logging.getLogger(__name__)

Operation = dict[str, Any]
"""See :mod:`lifelong_moe.tracking.operations`."""
Perform = Callable[[Operation, bytes | None], object]

SPOOL = "spool"
MAX_FILE_BYTES = 1 << 28
"""Largest artifact that is delivered."""
_ADDRESS = "address"
_MAX_ADDRESS_BYTES = 1 << 16
_FILE = re.compile(r"([0-9a-f]{64})(\.\w{1,16})?")
_TAKEN = re.compile(r"taken-(\d{6,12})\.jsonl")


class RefusedError(Exception):
    """The store works, but will never accept this operation."""


@dataclass(frozen=True)
class Delivered:
    """The outcome of a delivery."""

    operations: int = 0
    """Accepted by MLflow."""
    refused: int = 0
    """Moved to ``refused.jsonl``."""


class Spool:
    """The undelivered operations of one tracking store.

    Args:
        root: The ``mlruns/`` directory; nothing is written before the first :meth:`append`.
        uri: Tracking URI, with or without its credentials.
    """

    def __init__(self, root: Path, uri: str) -> None:
        self.address = shown_address(uri)
        self.path = root / SPOOL / text_sha256(_identity(uri))[:SHORT]
        self._pending = self.path / "pending.jsonl"

    @property
    def empty(self) -> bool:
        """Whether nothing is left to deliver."""
        return not _holds_records(self.path)

    def append(self, operation: Operation, content: bytes | None = None) -> None:
        """Store an operation; it is on disk when this returns.

        Args:
            operation: The operation; a JSON object without ``file``.
            content: Bytes of its file, if any; ``path`` in the operation then names the artifact.

        Raises:
            OSError: If the disk is full or cannot be written.
        """
        with self._locked("spool.lock"):
            if not (self.path / _ADDRESS).exists():
                write_atomic(self.path / _ADDRESS, self.address)
            # The file first: a line must never name a file that is not there.
            if content is not None:
                operation = operation | {"file": self._keep(content, operation["path"])}
            append_line(self._pending, json.dumps(operation, allow_nan=False, separators=(",", ":")))

    def _keep(self, content: bytes, path: str) -> str:
        name = hashlib.sha256(content).hexdigest() + PurePosixPath(path).suffix
        if not (self.path / "files" / name).exists():
            write_atomic(self.path / "files" / name, content)
        return name

    def deliver(self, perform: Perform, seconds: float = math.inf) -> Delivered:
        """Deliver and remove all operations, oldest first.

        Args:
            perform: Performs one operation with the bytes of its file; raises :class:`RefusedError` to put it aside,
                and anything else to stop the delivery.
            seconds: Longest time; the rest stays.

        Returns:
            The outcome; the spool is then empty.

        Raises:
            TimeoutError: If the time is over, or another process delivers all the while.
            Exception: As raised by ``perform``; its operation and all later ones stay.
        """
        told = refused = 0
        deadline = time.monotonic() + seconds
        # Others may append while we deliver, so look again until nothing is left.
        while not self.empty:
            with self._locked("delivery.lock", deadline):
                self._take()
                for path in _taken(self.path):
                    for outcome in self._tell(path, perform, deadline):
                        told, refused = told + outcome, refused + (not outcome)
                self._sweep()
        return Delivered(told, refused)

    def _take(self) -> None:
        """Rename the pending file, so that others append to a new one while this one is delivered."""
        with self._locked("spool.lock"):
            numbers = [int(path.stem.partition("-")[2]) for path in _taken(self.path)]
            if self._pending.exists():
                rename(self._pending, self.path / f"taken-{max(numbers, default=0) + 1:06d}.jsonl")

    def _tell(self, path: Path, perform: Perform, deadline: float) -> Iterator[bool]:
        """Deliver the operations of a file; yields for each whether it was accepted."""
        with open_regular(path, follow=False) as file:
            lines = [line for line in file.read().split(b"\n") if line]
        done = 0
        try:
            for line in lines:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{len(lines) - done} records are left in {path}")
                yield self._tell_line(line, perform)
                done += 1
        finally:
            # SIGKILL skips this; then all is delivered again, which changes nothing.
            if rest := lines[done:]:
                write_atomic(path, b"\n".join(rest) + b"\n")
            else:
                path.unlink()

    def _tell_line(self, line: bytes, perform: Perform) -> bool:
        try:
            try:
                operation = parse_json(line, self._pending)
                content = self._read(operation["file"]) if "file" in operation else None
            except (CorruptError, ValueError, TypeError, OSError) as error:
                raise RefusedError(f"the record is damaged: {error}") from error
            perform(operation, content)
        except RefusedError as error:
            refused, reason = self.path / "refused.jsonl", one_line(str(error))
            append_line(refused, json.dumps({"reason": reason, "operation": line.decode("utf-8", "replace")}))
            log.warning("MLflow at %s refused a record, kept in %s: %s", self.address, refused, reason)
            return False
        return True

    def _read(self, name: str) -> bytes:
        """The content of an artifact.

        Raises:
            ValueError: If the name is not one of ours, or the content does not have its hash.
            OSError: If the file is not there.
        """
        found = _FILE.fullmatch(name)
        if found is None:
            raise ValueError(f"{name!r} is not the name of a file of the spool")
        content = read_bounded(self.path / "files" / name, MAX_FILE_BYTES, follow=False)
        if hashlib.sha256(content).hexdigest() != found[1]:
            raise ValueError(f"{name} does not have the hash that names it")
        return content

    def _sweep(self) -> None:
        """Remove files that no operation names any more."""
        # Under the lock of those who append: a file comes before the line that names it.
        with self._locked("spool.lock"):
            text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in self.path.glob("*.jsonl"))
            for path in (self.path / "files").glob("*"):
                if _FILE.fullmatch(path.name) and path.name not in text:
                    path.unlink()

    def _locked(self, name: str, deadline: float = math.inf) -> AbstractContextManager[None]:
        return locked_when_free(self.path / name, deadline)


def left_for_others(root: Path, own: Collection[Spool]) -> list[str]:
    """Addresses of spools that hold something and are not among ``own``, as they may be shown.

    Args:
        root: The ``mlruns/`` directory.
        own: Spools that this user delivers.
    """
    paths = {spool.path for spool in own}
    others = [path for path in sorted((root / SPOOL).glob("*/")) if path not in paths and _holds_records(path)]
    return [_told_address(path) for path in others]


def _told_address(path: Path) -> str:
    """What a spool says about where its records were to go."""
    try:
        written = read_bounded(path / _ADDRESS, _MAX_ADDRESS_BYTES, follow=False).decode("utf-8", "replace")
    except OSError:
        return "an unknown address"
    return one_line(shown_address(written.strip()))


def _identity(uri: str) -> str:
    """What tells an address from others, whatever its user and password; only its hash is kept."""
    if is_web(uri):
        try:
            parts = urlsplit(uri)
            _ = parts.port
            return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        except ValueError:  # "/" or "@" in its password, which no client can read either
            pass
    return without_credentials(uri)


def _holds_records(path: Path) -> bool:
    return (path / "pending.jsonl").exists() or bool(_taken(path))


def _taken(path: Path) -> list[Path]:
    """Files of a spool whose delivery has begun, oldest first."""
    found = (one for one in path.glob("taken-*.jsonl") if _TAKEN.fullmatch(one.name))
    return sorted(found, key=lambda one: int(one.stem.partition("-")[2]))
