"""Cut a shard into training blocks. Torch-free, so that plans can count blocks too."""

from __future__ import annotations

import bisect

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.data.tokens.shards import TokenShard


def block_borders(shard: TokenShard, context: int) -> NDArray[np.int64]:
    """Where blocks begin, and the end: block ``i`` reads ``tokens[borders[i]:borders[i + 1]]``, at most ``context``.

    Every token is in one block. Text is cut every ``context`` tokens, so that only the last block may be short; of
    pairs a block takes as many whole ones, in order, as fit.

    Args:
        shard: Text, or pairs of at most ``context`` tokens each.
        context: Tokens a block (S), at least 1.

    Returns:
        int64 ``(blocks + 1,)``.

    Raises:
        ValueError: If ``context`` is not positive or a pair does not fit.
    """
    if context < 1:
        raise ValueError(f"context={context} must be positive")
    if shard.separator is None:
        return np.append(np.arange(0, shard.num_tokens, context), shard.num_tokens)
    ends, borders = shard.offsets.tolist(), [0]
    while borders[-1] < shard.num_tokens:
        # Sorted ends and binary search: a shard may hold millions of pairs.
        border = ends[bisect.bisect_right(ends, borders[-1] + context) - 1]
        if border == borders[-1]:
            raise ValueError(f"the pair at token {border} is longer than context={context}")
        borders.append(border)
    return np.array(borders, dtype=np.int64)


def epochs(positions: float, shard: TokenShard, context: int) -> float:
    """Return the number of passes over a shard; at 1 every token was an input once.

    Args:
        positions: Trained on, the padding of short blocks included, as a stage's ``tokens`` are.
        shard: The text.
        context: Tokens a block.
    """
    # Blocks times context, because `positions` counts the padding of short blocks too.
    return positions / ((len(block_borders(shard, context)) - 1) * context)
