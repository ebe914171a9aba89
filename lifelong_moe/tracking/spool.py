"""What MLflow could not be told yet, on disk until it can.

``mlruns/spool/<hash of the address>/`` holds ``address`` (the tracking URI without credentials),
``pending.jsonl`` (an operation a line, appended by every process), ``taken-N.jsonl`` (what a delivery took from there),
``refused.jsonl`` (what the store would not take, with its reasons; for people) and ``files/`` (artifacts by SHA-256).

Operations are idempotent and delivered in order, so a delivery that is killed is simply repeated.
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
"""See :mod:`lifelong_moe.tracking.store`."""
Perform = Callable[[Operation, bytes | None], object]

SPOOL = "spool"
_ADDRESS = "address"


class RefusedError(Exception):
    """The store is well, but will never take this operation."""


@dataclass(frozen=True)
class Delivered:
    """What a delivery did."""

    operations: int = 0
    """Told to MLflow."""
    refused: int = 0
    """Put aside into ``refused.jsonl``."""


class Spool:
    """What one tracking store is still to be told.

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
        """Whether nothing is to be told."""
        return not self._pending.exists() and not self._taken()

    def append(self, operation: Operation, content: bytes | None = None) -> None:
        """Keep an operation; it is on disk when this returns.

        Args:
            operation: The operation; a JSON object without ``file``.
            content: Bytes of the file that goes with it; ``path`` then says what it is called.

        Raises:
            OSError: If the disk is full or cannot be written.
        """
        with self._locked("spool.lock"):
            if not (self.path / _ADDRESS).exists():
                write_atomic(self.path / _ADDRESS, self.address)
            if content is not None:
                operation = operation | {"file": self._keep(content, operation["path"])}
            append_line(self._pending, json.dumps(operation, allow_nan=False, separators=(",", ":")))

    def _keep(self, content: bytes, path: str) -> str:
        name = hashlib.sha256(content).hexdigest() + PurePosixPath(path).suffix
        if not (self.path / "files" / name).exists():
            write_atomic(self.path / "files" / name, content)
        return name

    def deliver(self, perform: Perform, seconds: float = math.inf) -> Delivered:
        """Tell everything, oldest first, and forget what was told.

        Args:
            perform: Tells one operation with its file's bytes; raises :class:`RefusedError` for one to put aside, and
                anything else to stop here.
            seconds: Stop after this time; what is left stays.

        Returns:
            What was done; the spool is then empty.

        Raises:
            TimeoutError: If the time is over, or another process delivers all the while.
            Exception: What ``perform`` raised; it and everything after it stays.
        """
        told = refused = 0
        deadline = time.monotonic() + seconds
        while not self.empty:
            with self._locked("delivery.lock", deadline):
                self._take()
                for path in self._taken():
                    for outcome in self._tell(path, perform, deadline):
                        told, refused = told + outcome, refused + (not outcome)
                self._sweep()
        return Delivered(told, refused)

    def _take(self) -> None:
        """Move what is pending out of the way of those who append."""
        with self._locked("spool.lock"):
            numbers = [int(path.stem.partition("-")[2]) for path in self._taken()]
            if self._pending.exists():
                rename(self._pending, self.path / f"taken-{max(numbers, default=0) + 1:06d}.jsonl")

    def _taken(self) -> list[Path]:
        return sorted(self.path.glob("taken-*.jsonl"))

    def _tell(self, path: Path, perform: Perform, deadline: float) -> Iterator[bool]:
        """Tell what a file holds; yields for each operation whether it was accepted."""
        lines = [line for line in path.read_bytes().split(b"\n") if line]
        done = 0
        try:
            for line in lines:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{len(lines) - done} records are left in {path}")
                yield self._tell_line(line, perform)
                done += 1
        finally:
            # SIGKILL skips this, and then all is told again, which changes nothing.
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
        with self._locked("spool.lock"):
            text = "".join(path.read_text(encoding="utf-8") for path in self.path.glob("*.jsonl"))
            for path in (self.path / "files").glob("*"):
                if path.name not in text:
                    path.unlink()

    def _locked(self, name: str, deadline: float = math.inf) -> AbstractContextManager[None]:
        return locked_when_free(self.path / name, deadline)
