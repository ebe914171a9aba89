"""Excerpts by hand: how long they are, where they come from, and what they weigh."""

from __future__ import annotations

import numpy as np
import pytest

from lifelong_moe.data.tokens.excerpts import excerpts
from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.data.tokens.windows import evaluation_windows

BOS = 0


def shard_of(*lengths: int, separator: int | None = None) -> TokenShard:
    """Documents of BOS and ``length`` numbers each: hundreds name the document, the rest the place; 4 bytes a token."""
    rows = [[BOS, *range(100 * (i + 1), 100 * (i + 1) + n)] for i, n in enumerate(lengths)]
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    return TokenShard(np.concatenate(rows), offsets, np.array([4 * n for n in lengths]), separator)


def rows_of(shard: TokenShard) -> list[list[int]]:
    return [shard.document(i).tolist() for i in range(shard.num_documents)]


def test_a_long_document_is_cut_and_its_cuts_are_evenly_spaced() -> None:
    # An eighth of 32 tokens is 4: BOS and three more. 30 numbers are ten cuts, of which eight are taken.
    found = excerpts(shard_of(30), 16, 32)
    assert rows_of(found) == [[BOS, *range(100 + 3 * cut, 103 + 3 * cut)] for cut in (0, 1, 3, 4, 5, 6, 8, 9)]
    assert found.text_bytes.tolist() == [12] * 8
    assert found.num_tokens == 32


def test_excerpts_end_with_their_document_and_short_ones_are_many() -> None:
    # Cuts of 3 numbers: of the first document 3 and 1, of the second 2, of the third 3, 3 and 2, of the fourth 1.
    found = excerpts(shard_of(4, 2, 8, 1), 16, 32)
    assert rows_of(found) == [
        [BOS, 100, 101, 102], [BOS, 103], [BOS, 200, 201], [BOS, 300, 301, 302], [BOS, 303, 304, 305],
        [BOS, 306, 307], [BOS, 400],
    ]  # fmt: skip
    assert found.text_bytes.tolist() == [12, 4, 8, 12, 12, 8, 4]
    few = excerpts(shard_of(*[2] * 60), 16, 32)
    # Three tokens each with BOS, so eleven of sixty; the first and the last among them.
    assert few.num_documents == 11 and rows_of(few)[0][1] == 100 and rows_of(few)[-1][1] == 6000


def test_a_context_bounds_an_excerpt_and_it_fills_one_window() -> None:
    found = excerpts(shard_of(500, 300), 16, 1000)
    windows = evaluation_windows(found, 16, found.num_tokens)
    assert {len(row) for row in rows_of(found)} <= set(range(2, 17))
    assert len(windows) == found.num_documents and windows.num_tokens == found.num_tokens - found.num_documents
    # 34 and 20 cuts of up to 15 numbers, each with BOS: less than what is wanted, so all of the text is taken.
    assert found.num_tokens == 500 + 34 + 300 + 20
    assert windows.num_bytes == 4 * windows.num_tokens


def test_pairs_stay_whole() -> None:
    found = excerpts(shard_of(20, 6, 9, separator=7), 16, 12)
    assert found.separator == 7
    # Twelve tokens are one pair of the three; the first one.
    assert rows_of(found) == [[BOS, *range(100, 120)]] and found.text_bytes.tolist() == [80]
    assert excerpts(shard_of(20, 6, 9, separator=7), 16, 1000).num_documents == 3


def test_documents_without_text_are_passed_over() -> None:
    assert rows_of(excerpts(shard_of(0, 2, 0), 16, 32)) == [[BOS, 200, 201]]
    for empty in (shard_of(0, 0), shard_of(0, separator=7)):
        with pytest.raises(ValueError, match="no token to score"):
            excerpts(empty, 16, 32)
