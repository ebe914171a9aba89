"""Select the held-out tokens to score when there are too many, so that no source takes more than its share.

Confidence is measured over sources. Taken in order, one huge document would be all that is scored, and bound nothing.

Legend: D documents, C sources.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.data.tokens.windows import counted_tokens

SHARES = 20
"""Where there are sources enough none takes more than one part in so many; documents are then rarely cut."""


def spread(scored_D: NDArray[np.int64], sources: Sequence[str], max_tokens: int) -> NDArray[np.int64]:
    """How many tokens of each document to score, in the order given, until there are ``max_tokens`` or a little more.

    A source has its share when it has ``max_tokens / 20``, or as much as lets all sources together reach
    ``max_tokens``; the document that would exceed it is cut. What fits as a whole is taken as a whole.

    Args:
        scored_D: Tokens of each document that could be scored.
        sources: Source of each.
        max_tokens: At least 1.
    """
    if scored_D.sum() <= max_tokens:
        return scored_D.copy()
    _, source_D = np.unique(np.array(sources), return_inverse=True)
    sizes_C = np.bincount(source_D, scored_D).astype(np.int64)
    # Rounded up. With few sources a twentieth each would not reach the total, so the level decides.
    share = max(-(-max_tokens // SHARES), _level(sizes_C, max_tokens))
    taken_D, taken = np.zeros_like(scored_D), 0
    left: dict[int, int] = defaultdict(lambda: share)
    for i, source in enumerate(source_D.tolist()):
        if taken >= max_tokens:
            break
        taken_D[i] = min(int(scored_D[i]), left[source])
        left[source] -= int(taken_D[i])
        taken += int(taken_D[i])
    return taken_D


def _level(sizes_C: NDArray[np.int64], total: int) -> int:
    """The smallest limit per source with which sources of these sizes together still reach ``total``."""
    rest, ordered = total, np.sort(sizes_C)
    for i, size in enumerate(ordered.tolist()):
        # From the smallest source: those below the level give all they have, the others divide the rest.
        level = -(-rest // (len(ordered) - i))
        if level <= size:
            return level
        rest -= size
    raise ValueError(f"{int(sizes_C.sum())} tokens do not reach {total}")


def spread_shard(shard: TokenShard, sources: Sequence[str], max_tokens: int) -> tuple[TokenShard, NDArray[np.int64]]:
    """The documents of a held-out set that are scored, cut where their source has its share, and their places in it.

    Pairs of prompt and answer, none of which is longer than a context, are never cut.
    """
    scored_D = np.diff(np.concatenate([[0], np.cumsum(counted_tokens(shard))])[shard.offsets])
    taken_D = spread(scored_D, sources, max_tokens)
    chosen = np.flatnonzero(taken_D)
    lengths_D = np.diff(shard.offsets)
    # Plus BOS, which precedes the first scored token and is not scored itself.
    kept = lengths_D[chosen] if shard.separator is not None else 1 + taken_D[chosen]
    rows = [shard.document(int(i))[:n] for i, n in zip(chosen, kept, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
    part = replace(shard, tokens=np.concatenate(rows), offsets=offsets, text_bytes=shard.text_bytes[chosen])
    return part, chosen
