"""How held-out tokens that are too many are spread over sources: by hand, and on any sizes against a search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.evaluation.spread import spread, spread_shard

MakeShard = Callable[[Sequence[Sequence[int]]], TokenShard]


def taken(sizes: Sequence[int], sources: str, most: int) -> list[int]:
    return spread(np.array(sizes, dtype=np.int64), list(sources), most).tolist()


def test_by_hand() -> None:
    assert taken([5000, 60, 50, 40], "abcd", 200) == [55, 55, 50, 40]  # shares of 55 reach 200
    assert taken([90, 10, 90, 10], "aabb", 120) == [60, 0, 60, 0]
    assert taken([30, 40, 90, 10], "aabb", 120) == [30, 30, 60, 0]
    assert taken([5, 5], "ab", 100) == [5, 5]
    assert taken([7] * 40, "".join(map(chr, range(200, 240))), 20) == [1] * 20 + [0] * 20  # a twentieth each
    assert taken([7] * 400, "".join(map(chr, range(200, 600))), 200) == [7] * 29 + [0] * 371  # whole, 203 of them


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), min_size=1, max_size=40),
    st.integers(1, 400),
)
def test_no_source_has_more_than_its_share(documents: list[tuple[int, int]], most: int) -> None:
    sizes, sources = [size for size, _ in documents], [str(source) for _, source in documents]
    found = spread(np.array(sizes, dtype=np.int64), sources, most).tolist()
    if sum(sizes) <= most:
        assert found == sizes
        return
    held: Counter[str] = Counter()
    for source, size in zip(sources, sizes, strict=True):
        held[source] += size
    level = next(c for c in range(most + 1) if sum(min(c, n) for n in held.values()) >= most)
    share, got = max(level, -(-most // 20)), Counter[str]()
    for source, size in zip(sources, found, strict=True):
        got[source] += size
    assert all(0 <= n <= size for n, size in zip(found, sizes, strict=True))
    assert max(got.values()) <= share and most <= sum(found) < most + share


def test_documents_are_cut_at_their_end_and_keep_their_places(make_shard: MakeShard) -> None:
    shard = make_shard([[0, *range(1, 61)], [0, 1, 2], [0], [0, 3, 4, 5]])
    part, chosen = spread_shard(shard, list("abcd"), 10)
    assert chosen.tolist() == [0, 1, 3]
    assert [part.document(i).tolist() for i in range(3)] == [[0, 1, 2, 3, 4, 5], [0, 1, 2], [0, 3, 4, 5]]


def test_pairs_are_never_cut(make_shard: MakeShard) -> None:
    shard = replace(make_shard([[0, 1, 9, 2, 3, 4, 5], [0, 9, 3], [0, 1, 9, 4]]), separator=9)
    part, chosen = spread_shard(shard, list("abc"), 6)  # 5 answer tokens, 2, 2
    assert chosen.tolist() == [0, 1, 2] and part.document(0).tolist() == [0, 1, 9, 2, 3, 4, 5]
    assert part.separator == 9
