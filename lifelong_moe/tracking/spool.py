"""The spool: records that MLflow could not take yet, kept on disk until it can.

``mlruns/spool/<hash of the address>/`` holds ``address`` (the tracking URI without credentials),
``pending.jsonl`` (one operation a line, appended by every process), ``taken-N.jsonl`` (lines that a delivery took from
there), ``refused.jsonl`` (operations that the store refused, with its reasons; for people) and ``files/`` (artifacts by
SHA-256).

Operations are idempotent and delivered in order, so a killed delivery is simply repeated.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lifelong_moe.storage.credentials import without_credentials
from lifelong_moe.storage.files import append_line, rename, write_atomic
from lifelong_moe.storage.keys import SHORT, text_sha256
from lifelong_moe.storage.locks import locked_when_free

log = logging.getLogger(__name__)

Operation = dict[str, Any]
"""See :mod:`lifelong_moe.tracking.operations`."""
Perform = Callable[[Operation, bytes | None], object]

SPOOL = "spool"
_ADDRESS = "address"


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
        self.address = without_credentials(uri)
        self.path = root / SPOOL / text_sha256(self.address)[:SHORT]
        self._pending = self.path / "pending.jsonl"

    @classmethod
    def all(cls, root: Path) -> list[Spool]:
        """Every spool under ``root`` that holds something."""
        addresses = sorted((root / SPOOL).glob(f"*/{_ADDRESS}"))
        found = [cls(root, path.read_text(encoding="utf-8")) for path in addresses]
        return [spool for spool in found if not spool.empty]

    @property
    def empty(self) -> bool:
        """Whether nothing is left to deliver."""
        return not self._pending.exists() and not self._taken()

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
                for path in self._taken():
                    for outcome in self._tell(path, perform, deadline):
                        told, refused = told + outcome, refused + (not outcome)
                self._sweep()
        return Delivered(told, refused)

    def _take(self) -> None:
        """Rename the pending file, so that others append to a new one while this one is delivered."""
        with self._locked("spool.lock"):
            numbers = [int(path.stem.partition("-")[2]) for path in self._taken()]
            if self._pending.exists():
                rename(self._pending, self.path / f"taken-{max(numbers, default=0) + 1:06d}.jsonl")

    def _taken(self) -> list[Path]:
        return sorted(self.path.glob("taken-*.jsonl"))

    def _tell(self, path: Path, perform: Perform, deadline: float) -> Iterator[bool]:
        """Deliver the operations of a file; yields for each whether it was accepted."""
        lines = [line for line in path.read_bytes().split(b"\n") if line]
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
                operation = json.loads(line)
                content = (self.path / "files" / operation["file"]).read_bytes() if "file" in operation else None
            except (ValueError, FileNotFoundError) as error:
                raise RefusedError(f"the record is damaged: {error}") from error
            perform(operation, content)
        except RefusedError as error:
            record = {"reason": str(error), "operation": line.decode("utf-8", "replace")}
            with (self.path / "refused.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            log.warning("MLflow at %s refused a record, kept in %s: %s", self.address, file.name, error)
            return False
        return True

    def _sweep(self) -> None:
        """Remove files that no operation names any more."""
        # Under the lock of those who append: a file comes before the line that names it.
        with self._locked("spool.lock"):
            text = "".join(path.read_text(encoding="utf-8") for path in self.path.glob("*.jsonl"))
            for path in (self.path / "files").glob("*"):
                if path.name not in text:
                    path.unlink()

    def _locked(self, name: str, deadline: float = math.inf) -> AbstractContextManager[None]:
        return locked_when_free(self.path / name, deadline)
