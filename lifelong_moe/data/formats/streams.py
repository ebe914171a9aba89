"""Bounded reading of user files: regular files only, UTF-8 only, compressed ones only within limits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lifelong_moe.data.formats.bad_lines import BadLines
from lifelong_moe.data.formats.compression import COMPRESSED, unpack
from lifelong_moe.data.formats.limits import Portion, Quota
from lifelong_moe.errors import DataError
from lifelong_moe.storage.modes import SHARED, as_private_as
from lifelong_moe.storage.opening import open_regular

# Most are pickles, or may contain one, which runs code when it is loaded.
_NEVER_LOADED = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".npy", ".npz", ".joblib", ".faiss")
_UTF8_BOM = b"\xef\xbb\xbf"

if TYPE_CHECKING:
    from lifelong_moe.data.formats.compression import ByteStream


@dataclass(frozen=True)
class OpenFile:
    """A file that was opened once: what is checked, hashed and parsed is the same bytes, whatever its name leads to."""

    path: Path
    """What messages call it; its endings tell its kind."""
    data: ByteStream
    """Its bytes, at their beginning; it can seek."""
    portion: Portion
    """Its share of what may be read."""
    mode: int = SHARED
    """Permissions of copies of its text: as private as the file."""
    notes: list[str] = field(default_factory=list)
    """What its reader found out that people should know."""
    bad_lines: BadLines | None = None
    """Takes lines that hold no document; None: the first of them is an error."""


@contextlib.contextmanager
def open_file(path: Path, quota: Quota | None = None, *, follow: bool = True) -> Iterator[OpenFile]:
    """Open a regular file for reading.

    Args:
        path: The file.
        quota: Limits of all files that are read together; None for a file by itself.
        follow: Whether ``path`` itself may be a symbolic link; see :func:`open_regular`.

    Raises:
        DataError: Missing, unreadable, or not a regular file.
    """
    try:
        data = open_regular(path, follow=follow)
    except OSError as error:
        raise unreadable(path, error) from error
    with data:
        stat = os.fstat(data.fileno())
        yield OpenFile(path, data, Portion(path, stat.st_size, quota or Quota()), as_private_as(stat.st_mode))


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file that cannot be opened."""
    reason = error.strerror or str(error)
    # "a FIFO", "a symbolic link": what it is, and not what went wrong.
    return DataError(f"{path}: {'is' if reason.startswith('a ') else 'cannot be read:'} {reason}.")


def unpacked(file: OpenFile) -> ByteStream:
    """The file's content: ``.gz`` and ``.zst`` unpacked, a leading UTF-8 byte order mark passed over.

    Raises:
        DataError: UTF-16, or compressed but damaged or unpacking beyond the limits.
    """
    stream = _stream(file)
    # Peeked, not read: a stream of unpacked text cannot seek back.
    head = stream.peek(4)[:4]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or head[:1] == b"\0" or head[1:2] == b"\0":
        raise DataError(f"{file.path}:1: this is UTF-16 or binary, not UTF-8; iconv -f UTF-16 -t UTF-8 converts it.")
    if head.startswith(_UTF8_BOM):
        stream.read(len(_UTF8_BOM))
    return stream


def _stream(file: OpenFile) -> ByteStream:
    if file.path.suffix.lower() in COMPRESSED:
        return unpack(file.path, file.data, file.portion)
    file.portion.take(file.portion.packed_bytes)
    return file.data


def read_bytes(file: OpenFile, most_bytes: int) -> bytes | None:
    """The file's content, ``.gz`` and ``.zst`` unpacked; None if it is longer than ``most_bytes``.

    Raises:
        DataError: Compressed but damaged, or unpacking beyond the limits.
    """
    data = _stream(file).read(most_bytes + 1)
    return data if len(data) <= most_bytes else None


def read_whole(file: OpenFile, most_bytes: int) -> bytes | None:
    """The file's :func:`unpacked` content; None if it is longer than ``most_bytes``."""
    # One byte more than allowed shows that a file is too long without reading all of it.
    data = unpacked(file).read(most_bytes + 1)
    return data if len(data) <= most_bytes else None


def refuse_pickled(path: Path) -> None:
    """Refuse a file by its name if its kind is usually unpickled: it is never opened.

    Raises:
        DataError: It is of such a kind.
    """
    if path.suffix.lower() in _NEVER_LOADED:
        raise DataError(f"{path}: files of this kind can run code when loaded and are never read.")


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
        # JSON's \ud800 escapes make strings that Python holds but that no tokenizer can encode.
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(f"{where}: {name} holds a lone surrogate \\u{code:04x}, which is no character.") from error
    return text


def _kind(value: object) -> str:
    names = {"NoneType": "null", "bool": "true/false", "int": "a number", "float": "a number", "dict": "an object"}
    return names.get(type(value).__name__, f"a {type(value).__name__}")
