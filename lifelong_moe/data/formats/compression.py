"""Unpacking ``.gz`` and ``.zst`` within limits: a small file must not become an endless one."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lifelong_moe.data.formats.limits import ALLOWANCE_BYTES, Portion, Quota
from lifelong_moe.errors import DataError

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
"""Endings of compressed files, and what their content is called."""
_CHUNK_BYTES = 1 << 20

if TYPE_CHECKING:
    ByteStream = io.BufferedReader[Any]


class _Unpacked(io.RawIOBase):
    """Reads a compressed file and stops where it unpacks to far more than text ever does."""

    def __init__(self, path: Path, packed: IO[bytes], portion: Portion) -> None:
        self._path = path
        self._kind = COMPRESSED[path.suffix.lower()]
        self._read = _gzip_reader(packed) if self._kind == "gzip" else _zstd_reader(packed)
        self._portion = portion

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill ``buffer`` with unpacked bytes; 0 at the end."""
        try:
            data = self._read(len(buffer))
        except EOFError as error:
            raise DataError(f"{self._path}: the gzip stream ends early; the file is truncated.") from error
        # BadGzipFile of gzip and the errors of Arrow are OSErrors.
        except (OSError, zlib.error) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self._path}: not a valid {self._kind} file: {reason}.") from error
        # Counted while unpacking: neither format states reliably how many bytes will come.
        self._portion.take(len(data))
        buffer[: len(data)] = data
        return len(data)


def _gzip_reader(packed: IO[bytes]) -> Any:
    return gzip.GzipFile(fileobj=packed, mode="rb").read1


def _zstd_reader(packed: IO[bytes]) -> Any:
    """Arrow's: Python's own library knows zstd from 3.14 on only. Windows over 128 MiB are refused by zstd itself."""
    import pyarrow  # type: ignore[import-untyped]

    return pyarrow.CompressedInputStream(packed, "zstd").read


def unpack(path: Path, packed: IO[bytes], portion: Portion) -> ByteStream:
    """Return the unpacked content of a compressed file.

    Args:
        path: Tells its kind, and is for messages.
        packed: The open file, at its beginning; it can seek.
        portion: Counts the unpacked bytes.

    Raises:
        DataError: It unpacks to more than text ever does. Reading raises it, too, also where the file is truncated or
            damaged.
    """
    _refuse_bomb(path, packed, portion.packed_bytes)
    packed.seek(0)
    return io.BufferedReader(_Unpacked(path, packed, portion), _CHUNK_BYTES)


def _refuse_bomb(path: Path, packed: IO[bytes], packed_bytes: int) -> None:
    """Unpack up to the allowance once, unparsed: a bomb of short lines would else take long to reach it."""
    # Counted apart: these bytes are not kept.
    stream = _Unpacked(path, packed, Portion(path, packed_bytes, Quota()))
    buffer, unpacked = bytearray(_CHUNK_BYTES), 0
    while unpacked <= ALLOWANCE_BYTES and (read := stream.readinto(buffer)):
        unpacked += read
