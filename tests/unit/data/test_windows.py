"""Evaluation windows: by hand on one document, and by hypothesis on any."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifelong_moe.data.shards import TokenShard
from lifelong_moe.data.windows import EvaluationSet, evaluation_windows

MakeShard = Callable[[Sequence[Sequence[int]]], TokenShard]


def test_windows_of_one_document(make_shard: MakeShard) -> None:
    windows = evaluation_windows(make_shard([[0, *range(1, 9)]]), context=4, max_tokens=1)
    assert windows.token_ids.tolist() == [[0, 1, 2, 3], [0, 3, 4, 5], [0, 5, 6, 7]]
    assert windows.target_ids.tolist() == [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8]]
    assert windows.scored.astype(int).tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert windows.valid.all()
    assert windows.start.tolist() == [1, 3, 5]
    assert (windows.num_tokens, windows.num_bytes, windows.num_documents) == (8, 80, 1)


def test_padding_and_order_by_length(make_shard: MakeShard) -> None:
    windows = evaluation_windows(make_shard([[0, 1], [0, 2, 3, 4, 5, 6], [0, 7, 8]]), context=4, max_tokens=100)
    assert windows.token_ids.tolist() == [[0, 2, 3, 4], [0, 4, 5, 0], [0, 7, 0, 0], [0, 0, 0, 0]]
    assert windows.target_ids.tolist() == [[2, 3, 4, 5], [4, 5, 6, 0], [7, 8, 0, 0], [1, 0, 0, 0]]
    assert windows.valid.sum(axis=1).tolist() == [4, 3, 2, 1]
    assert windows.scored.sum(axis=1).tolist() == [4, 1, 2, 1]
    assert windows.document.tolist() == [1, 1, 2, 0]


def test_whole_documents_until_max_tokens(make_shard: MakeShard) -> None:
    shard = make_shard([[0, 1, 2, 3], [0], [0, 4, 5], [0, 6]])
    assert evaluation_windows(shard, 8, 3).num_documents == 1
    windows = evaluation_windows(shard, 8, 4)
    assert (windows.num_tokens, windows.num_bytes, windows.num_documents) == (5, 50, 2)  # the empty one has no window


def test_groups_follow_their_tokens(make_shard: MakeShard) -> None:
    calls = []

    def ids(tokens: np.ndarray) -> np.ndarray:
        calls.append(tokens.tolist())
        return tokens.astype(np.int64) * 10 + 1

    windows = evaluation_windows(make_shard([[0, 1, 2, 3, 4, 5, 6], [0, 9]]), 4, 100).with_groups(ids)
    assert calls == [[0, 1, 2, 3, 4, 5, 6], [0, 9]]
    assert windows.token_ids.tolist() == [[0, 1, 2, 3], [0, 3, 4, 5], [0, 0, 0, 0]]
    assert windows.group_ids.tolist() == [[1, 11, 21, 31], [1, 31, 41, 51], [1, 0, 0, 0]]
    with pytest.raises(ValueError, match="group ids for"):
        windows.with_groups(lambda tokens: tokens[1:])


def test_refuses(make_shard: MakeShard) -> None:
    with pytest.raises(ValueError, match="must be at least 2"):
        evaluation_windows(make_shard([[0, 1]]), 1, 1)
    with pytest.raises(ValueError, match="no token to score"):
        evaluation_windows(make_shard([[0]]), 4, 1)


def _scored_positions(windows: EvaluationSet, document: int) -> dict[int, int]:
    """Return for each scored position of a document how many of its tokens the window shows before it."""
    found: dict[int, int] = {}
    for row in np.flatnonzero(windows.document == document):
        for column in np.flatnonzero(windows.scored[row]):
            position = int(windows.start[row] + column)
            assert position not in found
            found[position] = int(column)
    return found


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4).filter(lambda ns: max(ns) > 1), st.integers(2, 17))
def test_each_token_is_scored_once_with_enough_context(lengths: list[int], context: int) -> None:
    documents = [[0, *range(1, length)] for length in lengths]
    offsets = np.cumsum([0, *lengths])
    flat = np.array([token for document in documents for token in document], dtype=np.uint16)
    windows = evaluation_windows(TokenShard(flat, offsets, np.array(lengths)), context, 10**6)
    assert windows.num_tokens == sum(lengths) - len(lengths)
    assert (windows.token_ids[:, 0] == 0).all()
    assert not (windows.scored & ~windows.valid).any()
    assert (windows.target_ids[windows.scored] != 0).all()
    assert (np.diff(windows.valid.sum(axis=1)) <= 0).all()
    assert np.array_equal(
        windows.token_ids[:, 1:][windows.valid[:, 1:]], windows.target_ids[:, :-1][windows.valid[:, 1:]]
    )
    for index, length in enumerate(lengths):
        found = _scored_positions(windows, index)
        assert sorted(found) == list(range(1, length))
        # At least all but a stride of a full window, or the whole text before the token.
        assert all(shown >= min(position - 1, context - 1 - context // 2) for position, shown in found.items())
