"""What a teacher made of blocks that it has seen before, kept on disk.

Legend: N blocks asked for, S tokens a block, W width of the teacher's final hidden states.
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

MARK = 4
"""Bytes of a block's mark: the width of what is kept of it, 0 if nothing is."""


class TeacherCache:
    """Final hidden states by block, float32, in a sparse file: with the head they are all logits.

    The teacher is asked about one block at a time, so that an answer does not depend on what else is in a batch, and
    an interrupted stage goes on with the same bits. A block is marked after it was written; a process that is killed
    in between leaves it unmarked. A full disk is an ``OSError``.

    Source:
        Caching in place of a running teacher: Sparse Logit Sampling (ACL 2025), which keeps a sample of the logits;
        hidden states are smaller than all logits by V / W, and exact for a teacher of at most 32 bits.
    """

    def __init__(self, path: Path, context: int) -> None:
        """Open or begin.

        Args:
            path: A file in the stage's work; another beside it says which blocks are known.
            context: Tokens a block (S).
        """
        self.context = context
        self._hidden, self._known = (self._opened(p) for p in (path, path.with_suffix(".known")))

    def _opened(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def hidden(self, block_N: Tensor, ask: Callable[[int], Tensor]) -> Tensor:
        """The teacher's final hidden states ``(N, S, W)``, float32, on the blocks' device.

        Args:
            block_N: Numbers of blocks, int64.
            ask: From a position in ``block_N`` to what the teacher makes of that block, ``(1, S, W)``; called for
                blocks that are not known yet.
        """
        found = [self._one(block, partial(ask, i)) for i, block in enumerate(block_N.tolist())]
        return torch.from_numpy(np.stack(found)).to(block_N.device)

    def _one(self, block: int, ask: Callable[[], Tensor]) -> np.ndarray:
        width = int.from_bytes(os.pread(self._known, MARK, block * MARK), "little")
        if width:
            size = 4 * self.context * width
            kept = np.frombuffer(os.pread(self._hidden, size, block * size), dtype=np.float32)
            return kept.reshape(self.context, width)
        answer = ask()[0].float().cpu().numpy()
        write_all(self._hidden, answer.tobytes(), block * answer.nbytes)
        write_all(self._known, answer.shape[1].to_bytes(MARK, "little"), block * MARK)
        return answer


def write_all(descriptor: int, data: bytes, offset: int) -> None:
    """``os.pwrite`` until all is written."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
