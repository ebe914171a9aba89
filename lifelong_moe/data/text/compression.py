"""Unpacking ``.gz`` and ``.zst`` within limits: a small file must not become an endless one."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lifelong_moe.errors import DataError

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
"""Endings of compressed files, and what their content is called."""
MAX_UNPACKED_BYTES = 64 << 30
"""Most bytes that one compressed file may unpack to."""
MAX_RATIO = 200
"""Highest ratio of unpacked to packed bytes; text reaches about 20. Applies beyond ``ALLOWANCE_BYTES``."""
ALLOWANCE_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20

if TYPE_CHECKING:
    ByteStream = io.BufferedReader[Any]


class _Unpacked(io.RawIOBase):
    """Reads a compressed file and stops where it unpacks to far more than text ever does."""

    def __init__(self, path: Path, packed: IO[bytes]) -> None:
        self._path = path
        self._packed = packed
        self._kind = COMPRESSED[path.suffix.lower()]
        self._read = _gzip_reader(packed) if self._kind == "gzip" else _zstd_reader(packed)
        self._num_bytes = 0

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
        buffer[: len(data)] = data
        self._num_bytes += len(data)
        if self._num_bytes > ALLOWANCE_BYTES and self._num_bytes > MAX_RATIO * self._packed.tell():
            raise DataError(f"{self._path}: unpacks to more than {MAX_RATIO} times its size, which no text does.")
        if self._num_bytes > MAX_UNPACKED_BYTES:
            raise DataError(f"{self._path}: unpacks to more than {MAX_UNPACKED_BYTES} bytes; split it.")
        return len(data)


def _gzip_reader(packed: IO[bytes]) -> Any:
    return gzip.GzipFile(fileobj=packed, mode="rb").read1


def _zstd_reader(packed: IO[bytes]) -> Any:
    """Arrow's: Python's own library knows zstd from 3.14 on only. Windows over 128 MiB are refused by zstd itself."""
    import pyarrow  # type: ignore[import-untyped]

    return pyarrow.CompressedInputStream(packed, "zstd").read


def unpack(path: Path, packed: IO[bytes]) -> ByteStream:
    """Return the unpacked content of ``packed``, an open file; ``path`` tells its kind and is for messages.

    Raises:
        DataError: It unpacks to more than text ever does. Reading raises it, too, also where the file is truncated or
            damaged.
    """
    _refuse_bomb(path)
    return io.BufferedReader(_Unpacked(path, packed), _CHUNK_BYTES)


def _refuse_bomb(path: Path) -> None:
    """Unpack up to the allowance once, unparsed: a bomb of short lines would else take long to reach it."""
    with path.open("rb") as packed, io.BufferedReader(_Unpacked(path, packed), _CHUNK_BYTES) as stream:
        unpacked = 0
        while unpacked <= ALLOWANCE_BYTES and (chunk := stream.read(_CHUNK_BYTES)):
            unpacked += len(chunk)
