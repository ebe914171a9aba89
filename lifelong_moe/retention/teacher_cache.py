"""Cache a teacher's final hidden states on disk, block by block.

Legend: N blocks requested, S tokens per block, W width of the teacher's final hidden states.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.plain_files import open_to_write

MARK = 4
"""Bytes of a block's mark: the width of its hidden states, 0 if they are not cached."""


class TeacherCache:
    """Final hidden states by block, float32, in a sparse file; the teacher's head turns them into logits.

    The teacher computes one block at a time, so that a result does not depend on its batch, and an interrupted stage
    continues with the same bits. A full disk raises ``OSError``.

    Source:
        Caching in place of a running teacher: Sparse Logit Sampling (ACL 2025), which stores a sample of the logits.
        Hidden states are smaller than all logits by V / W, and exact for a teacher of at most 32 bits.
    """

    def __init__(self, path: Path, context: int) -> None:
        """Open the cache, or create it.

        Args:
            path: A file in the stage's working folder; a second file beside it marks the cached blocks.
            context: Tokens per block (S).
        """
        self.context, self.path = context, path
        self._hidden, self._known = (self._opened(p) for p in (path, path.with_suffix(".known")))

    def _opened(self, path: Path) -> int:
        descriptor = open_to_write(path)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def hidden(self, block_N: Tensor, ask: Callable[[int], Tensor]) -> Tensor:
        """The teacher's final hidden states ``(N, S, W)``, float32, on the blocks' device.

        Args:
            block_N: Numbers of blocks, int64.
            ask: Computes the hidden states ``(1, S, W)`` of the block at a position of ``block_N``; called for blocks
                that are not cached.
        """
        found = [self._one(block, partial(ask, i)) for i, block in enumerate(block_N.tolist())]
        return torch.from_numpy(np.stack(found)).to(block_N.device)

    def _one(self, block: int, ask: Callable[[], Tensor]) -> np.ndarray:
        width = int.from_bytes(os.pread(self._known, MARK, block * MARK), "little")
        if width:  # a hole reads as zeros, past the end nothing is read: neither is a mark
            size = 4 * self.context * width
            # Before memory is taken for it, which a false mark could make any amount.
            if os.fstat(self._hidden).st_size < (block + 1) * size:
                raise CorruptError(f"{self.path}: holds no block {block}; remove it to compute it again.")
            kept = np.frombuffer(os.pread(self._hidden, size, block * size), dtype=np.float32)
            return kept.reshape(self.context, width)
        answer = ask()[0].float().cpu().numpy()
        # The mark comes last: a process that is killed in between leaves the block unmarked.
        write_all(self._hidden, answer.tobytes(), block * answer.nbytes)
        write_all(self._known, answer.shape[1].to_bytes(MARK, "little"), block * MARK)
        return answer


def write_all(descriptor: int, data: bytes, offset: int) -> None:
    """``os.pwrite`` until all is written."""
    # A single call may write less than it is given.
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
