"""What a teacher made of blocks that it has seen before, kept on disk.

Legend: N blocks asked for, S tokens a block, W width of the teacher's final hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class TeacherCache:
    """Final hidden states by block, float32, in a sparse file: with the head they are all logits, and nothing is lost.

    The teacher is asked about one block at a time, so that an answer does not depend on what else is in a batch, and
    an interrupted stage goes on with the same bits. A block is marked after it was written; a process that is killed
    in between leaves it unmarked.

    Source:
        Caching in place of a running teacher: Sparse Logit Sampling (ACL 2025), which keeps a sample of the logits;
        hidden states are smaller than those by V / W and exact.
    """

    def __init__(self, path: Path, num_blocks: int, context: int) -> None:
        """Open or begin.

        Args:
            path: A file in the stage's work; another beside it says which blocks are known.
            num_blocks: Blocks that there are.
            context: Tokens a block (S).
        """
        self.path, self.num_blocks, self.context = path, num_blocks, context
        self._hidden: np.memmap | None = None
        self._known = _mapped(path.with_suffix(".known"), np.uint8, (num_blocks,))

    def hidden(self, block_N: Tensor, ask: Callable[[int], Tensor]) -> Tensor:
        """The teacher's final hidden states ``(N, S, W)``, float32, on the blocks' device.

        Args:
            block_N: Numbers of blocks, int64.
            ask: From a position in ``block_N`` to what the teacher makes of that block, ``(1, S, W)``; called for
                blocks that are not known yet.
        """
        blocks: list[int] = block_N.tolist()
        for i, block in enumerate(blocks):
            if not self._known[block]:
                answer = ask(i)[0].float().cpu().numpy()
                self._of_width(answer.shape[1])[block] = answer
                self._known[block] = 1
        width = self.path.stat().st_size // (4 * self.num_blocks * self.context)
        return torch.from_numpy(self._of_width(width)[blocks]).to(block_N.device)

    def _of_width(self, width: int) -> np.memmap:
        if self._hidden is None:
            self._hidden = _mapped(self.path, np.float32, (self.num_blocks, self.context, width))
        return self._hidden


def _mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """An array in a file, which begins with zeros; several processes may open it at once."""
    with path.open("ab") as file:
        file.truncate(np.dtype(dtype).itemsize * math.prod(shape))
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)
