"""Bounded reading of user files: regular files only, UTF-8 only, compressed ones only within limits."""

from __future__ import annotations

import contextlib
import gzip
import io
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lifelong_moe.errors import DataError

MAX_LINE_BYTES = 16 << 20
"""Longest JSONL line."""
MAX_TEXT_FILE_BYTES = 256 << 20
"""Longest ``.txt`` file; it is one document."""
MAX_UNPACKED_BYTES = 64 << 30
"""Most bytes that one compressed file may unpack to."""
MAX_GZIP_RATIO = 200
"""Highest ratio of unpacked to packed bytes; text reaches about 20. Applies beyond ``GZIP_ALLOWANCE_BYTES``."""
GZIP_ALLOWANCE_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
_UTF8_BOM = b"\xef\xbb\xbf"


if TYPE_CHECKING:
    ByteStream = io.BufferedReader[Any]


class BoundedGzip(io.RawIOBase):
    """Reads a gzip file and stops where it unpacks to far more than text ever does."""

    def __init__(self, path: Path, packed: IO[bytes]) -> None:
        """Wrap ``packed``, an open file; ``path`` is for messages."""
        self._path = path
        self._packed = packed
        self._stream = gzip.GzipFile(fileobj=packed, mode="rb")
        self._unpacked = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill ``buffer`` with unpacked bytes; 0 at the end.

        Raises:
            DataError: Truncated, damaged, or unpacking beyond the limits.
        """
        try:
            data = self._stream.read1(len(buffer))
        except EOFError as error:
            raise DataError(f"{self._path}: the gzip stream ends early; the file is truncated.") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{self._path}: not a valid gzip file: {error}.") from error
        buffer[: len(data)] = data
        self._unpacked += len(data)
        if self._unpacked > GZIP_ALLOWANCE_BYTES and self._unpacked > MAX_GZIP_RATIO * self._packed.tell():
            raise DataError(
                f"{self._path}: unpacks to more than {MAX_GZIP_RATIO} times its size, which no text does; refused."
            )
        if self._unpacked > MAX_UNPACKED_BYTES:
            raise DataError(f"{self._path}: unpacks to more than {MAX_UNPACKED_BYTES} bytes; split it.")
        return len(data)


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[ByteStream]:
    """Open a regular file for reading, unpacking ``.gz``; a leading UTF-8 byte order mark is passed over.

    Raises:
        DataError: Not a regular file, unreadable, UTF-16, or a gzip file that is damaged or unpacks beyond the limits.
    """
    require_regular(path)
    try:
        raw = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error
    with raw:
        if path.suffix == ".gz":
            _refuse_bomb(path, raw)
            stream: ByteStream = io.BufferedReader(BoundedGzip(path, raw), _CHUNK_BYTES)
        else:
            stream = raw
        head = stream.peek(4)[:4]
        if head.startswith((b"\xff\xfe", b"\xfe\xff")) or head[:1] == b"\0" or head[1:2] == b"\0":
            raise DataError(f"{path}:1: this is UTF-16 or binary, not UTF-8; iconv -f UTF-16 -t UTF-8 converts it.")
        if head.startswith(_UTF8_BOM):
            stream.read(len(_UTF8_BOM))
        yield stream


def require_regular(path: Path) -> None:
    """Refuse what is not a regular file before opening it: opening a FIFO would wait forever.

    Raises:
        DataError: Missing, a directory, a FIFO, a device or a socket.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a FIFO" if stat.S_ISFIFO(mode) else "a device or socket"
        raise DataError(f"{path}: is {kind}, not a regular file.")


def _refuse_bomb(path: Path, raw: IO[bytes]) -> None:
    """Unpack up to the allowance once, unparsed: a bomb of short lines would else take long to reach it."""
    with io.BufferedReader(BoundedGzip(path, raw), _CHUNK_BYTES) as stream:
        unpacked = 0
        while unpacked <= GZIP_ALLOWANCE_BYTES and (chunk := stream.read(_CHUNK_BYTES)):
            unpacked += len(chunk)
    raw.seek(0)


def decode(data: bytes, where: str, offset: int = 0) -> str:
    """Decode UTF-8.

    Args:
        data: Bytes.
        where: ``file:line`` for the message.
        offset: Position of ``data`` in the file or line, bytes.

    Raises:
        DataError: Invalid UTF-8; names the byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise DataError(f"{where}: invalid UTF-8 at byte {offset + error.start} (0x{byte:02x}).") from error


def check_text(text: object, where: str, field: str | None = None) -> str:
    """Return ``text`` if a document can be made of it.

    Args:
        text: What stands in the file.
        where: ``file:line`` for the message.
        field: Name of the field, if there are fields.

    Raises:
        DataError: Not a string, blank, with NUL or a lone surrogate.
    """
    name = "the text" if field is None else f'"{field}"'
    if not isinstance(text, str):
        raise DataError(f"{where}: {name} must be a string; got {_kind(text)}.")
    if not text.strip():
        raise DataError(f"{where}: {name} is blank.")
    if "\0" in text:
        raise DataError(f"{where}: {name} holds a NUL character at position {text.index(chr(0))}; is this binary data?")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(f"{where}: {name} holds a lone surrogate \\u{code:04x}, which is no character.") from error
    return text


def _kind(value: object) -> str:
    names = {"NoneType": "null", "bool": "true/false", "int": "a number", "float": "a number", "dict": "an object"}
    return names.get(type(value).__name__, f"a {type(value).__name__}")
