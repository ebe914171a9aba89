"""Bounded reading of user files: regular files only, UTF-8 only, compressed ones only within limits."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lifelong_moe.data.text.compression import COMPRESSED, unpack
from lifelong_moe.errors import DataError

MAX_LINE_BYTES = 16 << 20
"""Longest JSONL line."""
MAX_TEXT_FILE_BYTES = 256 << 20
"""Longest ``.txt`` file; it is one document."""
# Most are pickles, or may contain one, which runs code when it is loaded.
_NEVER_LOADED = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".npy", ".npz", ".joblib", ".faiss")
_UTF8_BOM = b"\xef\xbb\xbf"

if TYPE_CHECKING:
    from lifelong_moe.data.text.compression import ByteStream


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[ByteStream]:
    """Open a regular file for reading, unpacking ``.gz`` and ``.zst``; a leading UTF-8 byte order mark is passed over.

    Raises:
        DataError: Not a regular file, unreadable, UTF-16, or compressed but damaged or unpacking beyond the limits.
    """
    require_regular(path)
    try:
        raw = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error
    with raw:
        stream: ByteStream = unpack(path, raw) if path.suffix.lower() in COMPRESSED else raw
        # Peeked, not read: a stream of unpacked text cannot seek back.
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
