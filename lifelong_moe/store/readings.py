"""A cache of what generations said of held-out text: ``cache/readings/``, files that can be made again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from safetensors import SafetensorError

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.files import write_unsynced
from lifelong_moe.storage.keys import SHORT, content_key
from lifelong_moe.storage.plain_files import open_stored

if TYPE_CHECKING:
    from torch import Tensor

MOST_BYTES = 1 << 30
"""A larger file is none of ours."""
DIGEST = "sha256"
"""Name of the tensor that holds the hash of all others: files are written without waiting for the disk, and after a
crash of the machine zeros in place of numbers would be believed."""

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
                tensors = load(file.read())
            # Files of earlier versions have no hash, and are made again.
            if tensors.pop(DIGEST).numpy().tobytes() != _digest(tensors):
                return None
            found = build(tensors)
        # A cache is made again, and never an error; a KeyError is also a type of numbers that torch does not have.
        except (OSError, CorruptError, SafetensorError, KeyError, ValueError):
            return None
        # Garbage collection removes what nobody opened for long. Another user's cache cannot be touched.
        with suppress(OSError):
            os.utime(path, follow_symlinks=False)
        return found

    def add(self, data_key: str, readers: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Store tensors atomically, where the cache can be written to and :meth:`find` would read so many."""
        import torch
        from safetensors.torch import save

        whole = {name: one.contiguous() for name, one in tensors.items()}
        content = save(whole | {DIGEST: torch.tensor(list(_digest(whole)), dtype=torch.uint8)})
        if len(content) <= MOST_BYTES:
            # Measuring goes on without a cache, which may be another user's.
            with suppress(OSError):
                write_unsynced(self._path(data_key, readers), content)


def _digest(tensors: Mapping[str, Tensor]) -> bytes:
    """Hash of contiguous tensors and their names."""
    import torch

    digest = hashlib.sha256()
    for name, one in sorted(tensors.items()):
        digest.update(f"{name} {one.dtype} {tuple(one.shape)}\n".encode())
        # As bytes, for numpy lacks some of torch's types.
        digest.update(one.flatten().view(torch.uint8).numpy().data)
    return digest.digest()
