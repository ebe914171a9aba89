"""A token shard from lists of ids."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from lifelong_moe.data.tokens.shards import TokenShard


def build_shard(documents: Sequence[Sequence[int]]) -> TokenShard:
    """Return a shard in memory; each document's text has ten bytes per non-BOS token."""
    lengths = [len(document) for document in documents]
    return TokenShard(
        tokens=np.array([token for document in documents for token in document], dtype=np.uint16),
        offsets=np.cumsum([0, *lengths]),
        text_bytes=np.array([10 * (length - 1) for length in lengths]),
    )


@pytest.fixture
def make_shard() -> Callable[[Sequence[Sequence[int]]], TokenShard]:
    """``build_shard``."""
    return build_shard
