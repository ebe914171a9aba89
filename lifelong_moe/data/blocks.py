"""Training samples: consecutive blocks of a token shard, as tensors. The only file of this package that needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lifelong_moe.data.order import SampleOrder
from lifelong_moe.data.pairs import is_answer
from lifelong_moe.data.shards import TokenShard
from lifelong_moe.errors import DataError


@dataclass(frozen=True, eq=False)
class BlockSource:
    """A shard cut into blocks of ``context`` inputs; documents run on from one block into the next."""

    shard: TokenShard
    context: int
    """Tokens a block (S)."""
    bos_id: int
    group_ids: np.ndarray | None = None
    """Cluster or label of each token of the shard ``(num_tokens,)``; None if routing needs none."""
    teacher_group_ids: np.ndarray | None = None
    """The same as the teacher, who does not know this stage's clusters, sees it; None if there is none."""
    limit: int | None = None
    """Blocks that may be used at most, from the beginning; None means all."""

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ValueError(f"context={self.context} must be positive")
        for ids in (self.group_ids, self.teacher_group_ids):
            if ids is not None and ids.shape != (self.shard.num_tokens,):
                raise ValueError(f"group_ids {ids.shape} for {self.shard.num_tokens} tokens")
        if len(self) == 0:
            raise DataError(
                f"too few tokens: one block of context {self.context} needs {self.context + 1}, "
                f"the training text has {self.shard.num_tokens}."
            )

    def __len__(self) -> int:
        """Return the number of blocks; the last token of a block's targets is the first input of the next."""
        blocks = max(0, self.shard.num_tokens - 1) // self.context
        return blocks if self.limit is None else min(blocks, self.limit)

    def block(self, index: int) -> dict[str, Tensor]:
        """Return block ``index`` as int64 tensors ``(S,)``; see ``BlockDataset``."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        part = slice(index * self.context, (index + 1) * self.context + 1)
        groups = (None if ids is None else ids[part] for ids in (self.group_ids, self.teacher_group_ids))
        block = _block(self.shard.tokens[part], self.bos_id, *groups)
        if self.answers is not None:
            block["scored"] = torch.from_numpy(self.answers[part][1:].copy())
        return block

    def num_scored(self, index: int) -> int:
        """Return how many targets of block ``index`` count."""
        if self.answers is None:
            return self.context
        return int(np.count_nonzero(self.answers[index * self.context + 1 : (index + 1) * self.context + 1]))

    @cached_property
    def answers(self) -> np.ndarray | None:
        """Which tokens are answers, bool ``(num_tokens,)``; None where all text counts."""
        separator = self.shard.separator
        return None if separator is None else is_answer(self.shard.tokens, self.shard.offsets, separator)


@dataclass(frozen=True, eq=False)
class RowSource:
    """Blocks that stand apart, each with its own last target."""

    rows: np.ndarray
    """Tokens ``(N, S + 1)``."""
    bos_id: int
    group_ids: np.ndarray | None = None
    """``(N, S + 1)``; see ``BlockSource``."""
    teacher_group_ids: np.ndarray | None = None

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.rows)

    def block(self, index: int) -> dict[str, Tensor]:
        """Return block ``index``; see ``BlockDataset``."""
        groups = (None if ids is None else ids[index] for ids in (self.group_ids, self.teacher_group_ids))
        return _block(self.rows[index], self.bos_id, *groups)

    def num_scored(self, index: int) -> int:
        """Return how many targets of block ``index`` count: all."""
        return self.rows.shape[1] - 1


def _block(
    tokens: np.ndarray, bos_id: int, group_ids: np.ndarray | None, teacher_group_ids: np.ndarray | None
) -> dict[str, Tensor]:
    """A sample from S + 1 tokens and their groups."""
    tokens_S1 = torch.from_numpy(tokens.astype(np.int64))
    token_ids, target_ids = tokens_S1[:-1].clone(), tokens_S1[1:].clone()
    groups, teacher_groups = (
        torch.zeros_like(token_ids) if ids is None else torch.from_numpy(ids[:-1].astype(np.int64))
        for ids in (group_ids, teacher_group_ids)
    )
    return {
        "token_ids": token_ids,
        "target_ids": target_ids,
        "document_ids": torch.cumsum(token_ids == bos_id, dim=0),
        "group_ids": groups,
        "teacher_group_ids": teacher_groups,
        "scored": torch.ones_like(token_ids, dtype=torch.bool),
    }


class BlockDataset(Dataset[dict[str, Tensor]]):
    """Sample ``n`` of a stage, for any ``n``: how many there are is for the sampler to say.

    A sample is a dict of int64 tensors ``(S,)``: ``token_ids``; ``target_ids``, shifted by one; ``document_ids``,
    the number of BOS up to and including a position (0 is the rest of a document begun in an earlier block);
    ``group_ids`` and ``teacher_group_ids``, aligned with the inputs, 0 without groups; ``scored``, bool, False where a
    target is part of a prompt. Scalars: ``sample``, which is n; ``replayed``, bool,
    ``ordinal``, how many samples of the same kind (new, or replayed) came before, and ``block``, the block's number
    among those of all sources: the same block has the same number whenever it comes.
    """

    def __init__(self, sources: Sequence[BlockSource | RowSource], order: SampleOrder) -> None:
        """Join sources and order.

        Args:
            sources: Source 0 is the new text, the others are replayed.
            order: Made for these sources' numbers of blocks.
        """
        self._sources = list(sources)
        self._order = order
        self._first_blocks = list(accumulate((len(source) for source in self._sources), initial=0))

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        source, block = self._order.at(n)
        replayed, ordinal = self.place(n)
        return {
            **self._sources[source].block(block),
            "sample": torch.tensor(n),
            "replayed": torch.tensor(replayed),
            "ordinal": torch.tensor(ordinal),
            "block": torch.tensor(self._first_blocks[source] + block),
        }

    def place(self, n: int) -> tuple[bool, int]:
        """Return ``replayed`` and ``ordinal`` of sample ``n``, which need no text."""
        before = self._order.num_replayed(n)
        replayed = self._order.num_replayed(n + 1) > before
        return replayed, before if replayed else n - before

    def num_scored(self, n: int) -> int:
        """Return how many targets of sample ``n`` count."""
        source, block = self._order.at(n)
        return self._sources[source].num_scored(block)
