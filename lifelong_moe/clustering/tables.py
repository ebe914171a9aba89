"""Tables from token ids to buckets, made of a text before training."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray


def balanced_table(counts_V: NDArray[np.integer], num_buckets: int) -> NDArray[np.int64]:
    """Give each token id to the bucket with least text so far, the most frequent id first.

    Args:
        counts_V: How often each token id occurs.
        num_buckets: Buckets.

    Returns:
        Bucket of each id, int64 ``(V,)``. Buckets' text differs by at most the most frequent id's.

    Source:
        Hash layers (arXiv:2106.04426), section 3.2, "balanced assignment".
    """
    table = np.zeros(len(counts_V), dtype=np.int64)
    # Ids that the text lacks are dealt out in turn: they count as a small part of one occurrence.
    weights = np.asarray(counts_V, dtype=np.float64) + 0.5 / max(1, len(counts_V))
    loads = [(0.0, bucket) for bucket in range(num_buckets)]
    for token_id in np.argsort(-weights, kind="stable").tolist():
        load, bucket = heapq.heappop(loads)
        table[token_id] = bucket
        heapq.heappush(loads, (load + float(weights[token_id]), bucket))
    return table
