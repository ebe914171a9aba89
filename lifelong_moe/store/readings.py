"""A cache of what generations said of held-out text: ``cache/readings/``, files that can be made again."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from torch import Tensor

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.keys import SHORT, content_key
from lifelong_moe.storage.plain_files import open_stored

MOST_BYTES = 1 << 30
"""A larger file is none of ours."""

T = TypeVar("T")


class ReadingCache:
    """Tensors by held-out text and by the generations of the mixture that read it."""

    def __init__(self, cache: Path) -> None:
        self.root = cache / "readings"

    def _path(self, data_key: str, readers: Sequence[str]) -> Path:
        key = content_key({"data": data_key, "readers": [*readers]})
        return self.root / f"{data_key[:SHORT]}-{key[:SHORT]}.safetensors"

    def find(self, data_key: str, readers: Sequence[str], build: Callable[[Mapping[str, Tensor]], T]) -> T | None:
        """What ``build`` makes of the tensors; None if there are none, or if they are damaged.

        Args:
            data_key: Hash of the text and of how it is read.
            readers: Hashes of the generations.
            build: Raises a ValueError if tensors are not what they should be.
        """
        from safetensors.torch import load  # imports torch, which commands that only list stages do without

        path = self._path(data_key, readers)
        try:
            with open_stored(path) as file:
                if os.fstat(file.fileno()).st_size > MOST_BYTES:
                    return None
                found = build(load(file.read()))
        # A cache is made again, and never an error; a KeyError is a type of numbers that torch does not have.
        except (OSError, CorruptError, SafetensorError, KeyError, ValueError):
            return None
        # Garbage collection removes what nobody opened for long. Another user's cache cannot be touched.
        with suppress(OSError):
            os.utime(path, follow_symlinks=False)
        return found

    def add(self, data_key: str, readers: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Store tensors atomically, where the cache can be written to and :meth:`find` would read so many."""
        from safetensors.torch import save

        content = save({name: one.contiguous() for name, one in tensors.items()})
        if len(content) <= MOST_BYTES:
            # Measuring goes on without a cache, which may be another user's.
            with suppress(OSError):
                write_atomic(self._path(data_key, readers), content)
