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

from lifelong_moe.clustering.chunks import ChunkDomains
from lifelong_moe.data.tokens.order import SampleOrder
from lifelong_moe.data.tokens.packing import block_borders
from lifelong_moe.data.tokens.pairs import precedes_answer
from lifelong_moe.data.tokens.shards import TokenShard

Domains = np.ndarray | ChunkDomains


@dataclass(frozen=True, eq=False)
class BlockSource:
    """A shard cut into blocks of at most ``context`` inputs, of which each token is one.

    Documents run on from one block into the next; pairs stay whole. The target of an input is the token after it, and
    BOS after the last one: every document ends where the next may begin.
    """

    shard: TokenShard
    context: int
    """Tokens a block (S); a shorter one is padded at its end."""
    bos_id: int
    domain_ids: Domains | None = None
    """Domain of each token of the shard ``(num_tokens,)``; None if routing needs none."""
    teacher_domain_ids: Domains | None = None
    """The same for the teacher, which does not know this stage's domains; None if there is no teacher."""
    limit: int | None = None
    """Blocks that may be used at most, from the beginning; None means all."""

    def __post_init__(self) -> None:
        for ids in (self.domain_ids, self.teacher_domain_ids):
            # An invariant of the caller, not a user's mistake: ids are made from this very shard.
            if ids is not None and ids.shape != (self.shard.num_tokens,):
                raise ValueError(f"domain_ids {ids.shape} for {self.shard.num_tokens} tokens")

    def __len__(self) -> int:
        """Return the number of blocks."""
        blocks = len(self.borders) - 1
        return blocks if self.limit is None else min(blocks, self.limit)

    def block(self, index: int) -> dict[str, Tensor]:
        """Return block ``index``; see ``BlockDataset``."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        begin, end = self.borders[index : index + 2]
        inputs, length = slice(begin, end), self.context
        # One token beyond the block, the last target; after the shard's last token padding supplies BOS.
        tokens = _padded(self.shard.tokens[begin : end + 1], length + 1, self.bos_id)
        real = _padded(np.ones(end - begin), length, 0)
        domains = (
            None if ids is None else _padded(ids[inputs], length, 0)
            for ids in (self.domain_ids, self.teacher_domain_ids)
        )
        scored = real if self.answered is None else _padded(self.answered[inputs], length, 0)
        return _block(tokens, self.bos_id, real, scored, *domains)

    def num_real(self, index: int) -> int:
        """Return how many tokens block ``index`` has, but for padding."""
        begin, end = self.borders[index : index + 2]
        return int(end - begin)

    def num_scored(self, index: int) -> int:
        """Return how many targets of block ``index`` count."""
        if self.answered is None:
            return self.num_real(index)
        begin, end = self.borders[index : index + 2]
        return int(np.count_nonzero(self.answered[begin:end]))

    def documents(self, blocks: Sequence[int]) -> np.ndarray:
        """Documents of which some blocks have tokens, by number in the shard, int64 and ascending."""
        begins, ends = (self.borders[np.array(blocks, dtype=np.int64) + i] for i in (0, 1))
        first = np.searchsorted(self.shard.offsets, begins, side="right") - 1
        last = np.searchsorted(self.shard.offsets, ends, side="left")
        return np.unique(np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)]))

    @cached_property
    def borders(self) -> np.ndarray:
        """Where blocks begin, and the end, int64."""
        return block_borders(self.shard, self.context)

    @cached_property
    def answered(self) -> np.ndarray | None:
        """Which tokens are followed by one of an answer, bool ``(num_tokens,)``; None where all text counts."""
        separator = self.shard.separator
        return None if separator is None else precedes_answer(self.shard.tokens, self.shard.offsets, separator)


@dataclass(frozen=True, eq=False)
class RowSource:
    """Blocks that stand apart, each with its own last target."""

    rows: np.ndarray
    """Tokens ``(N, S + 1)``."""
    bos_id: int
    domain_ids: np.ndarray | None = None
    """``(N, S + 1)``; see ``BlockSource``."""
    teacher_domain_ids: np.ndarray | None = None

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.rows)

    def block(self, index: int) -> dict[str, Tensor]:
        """Return block ``index``; see ``BlockDataset``."""
        domains = (None if ids is None else ids[index, :-1] for ids in (self.domain_ids, self.teacher_domain_ids))
        tokens, everywhere = self.rows[index], np.ones(self.rows.shape[1] - 1)
        return _block(tokens, self.bos_id, everywhere, everywhere, *domains)

    def num_real(self, index: int) -> int:
        """Return how many tokens block ``index`` has: none is padding."""
        return self.rows.shape[1] - 1

    def num_scored(self, index: int) -> int:
        """Return how many targets of block ``index`` count: all."""
        return self.num_real(index)


def _padded(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    """As int64, with ``fill`` at the end."""
    padded = np.full(length, fill, dtype=np.int64)
    padded[: len(values)] = values
    return padded


def _block(
    tokens_S1: np.ndarray,
    bos_id: int,
    mask_S: np.ndarray,
    scored_S: np.ndarray,
    domains_S: np.ndarray | None,
    teacher_domains_S: np.ndarray | None,
) -> dict[str, Tensor]:
    """A sample from S + 1 tokens and what is known of the first S."""
    token_ids, mask = _tensor(tokens_S1[:-1]), _tensor(mask_S).bool()
    domains, teacher_domains = (
        torch.zeros_like(token_ids) if ids is None else _tensor(ids) for ids in (domains_S, teacher_domains_S)
    )
    return {
        "token_ids": token_ids,
        "target_ids": _tensor(tokens_S1[1:]),
        # Padding is BOS as well, but begins no document.
        "document_ids": torch.cumsum((token_ids == bos_id) & mask, dim=0),
        "domain_ids": domains,
        "teacher_domain_ids": teacher_domains,
        "mask": mask,
        "scored": _tensor(scored_S).bool(),
    }


def _tensor(values: np.ndarray) -> Tensor:
    """A copy, int64."""
    # A copy: the shard is mapped read-only, which torch warns about, and embeddings need int64 indices.
    return torch.from_numpy(values.astype(np.int64))


class BlockDataset(Dataset[dict[str, Tensor]]):
    """Sample ``n`` of a stage, for any ``n``: how many there are is for the sampler to say.

    A sample is a dict of int64 tensors ``(S,)``: ``token_ids``; ``target_ids``, shifted by one; ``document_ids``,
    the number of BOS up to and including a position (0 is the rest of a document begun in an earlier block);
    ``domain_ids`` and ``teacher_domain_ids``, aligned with the inputs, 0 without domains; ``mask``, bool, False on
    padding, which is BOS, lies at the end and belongs to the last document; ``scored``, bool, False there and where a
    target is part of a prompt. Scalars: ``sample``, which is n; ``replayed``, bool; ``ordinal``, how many samples of
    the same kind (replayed, or new and of the same source) came before; and ``block``, the block's number among those
    of all sources: the same block has the same number whenever it comes.
    """

    def __init__(self, sources: Sequence[BlockSource | RowSource], order: SampleOrder) -> None:
        """Join sources and order.

        Args:
            sources: The first ones are the new text, the others are replayed.
            order: Made for these sources' numbers of blocks.
        """
        self.sources = list(sources)
        self._order = order
        # Numbers of blocks over all sources, by which the teacher's cached hidden states are found again.
        self._first_blocks = list(accumulate((len(source) for source in self.sources), initial=0))

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        source, block = self._order.at(n)
        replayed, ordinal = self.place(n)
        return {
            **self.sources[source].block(block),
            "sample": torch.tensor(n),
            "replayed": torch.tensor(replayed),
            "ordinal": torch.tensor(ordinal),
            "block": torch.tensor(self._first_blocks[source] + block),
        }

    def place(self, n: int) -> tuple[bool, int]:
        """Return ``replayed`` and ``ordinal`` of sample ``n``, which need no text."""
        return self._order.place(n)

    def sizes(self, n: int) -> tuple[int, int]:
        """Return how many tokens of sample ``n`` are real, and how many of their targets count."""
        source, block = self._order.at(n)
        return self.sources[source].num_real(block), self.sources[source].num_scored(block)
