"""Evaluation windows: by hand on one document, and by hypothesis on any."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.data.tokens.windows import EvaluationSet, evaluation_windows

MakeShard = Callable[[Sequence[Sequence[int]]], TokenShard]


def test_windows_of_one_document(make_shard: MakeShard) -> None:
    windows = evaluation_windows(make_shard([[0, *range(1, 9)]]), context=4, max_tokens=1)
    whole = windows.batch(slice(None))
    assert whole["token_ids"].tolist() == [[0, 1, 2, 3], [0, 3, 4, 5], [0, 5, 6, 7]]
    assert whole["target_ids"].tolist() == [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8]]
    assert whole["scored"].astype(int).tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert whole["valid"].all()
    assert windows.start.tolist() == [1, 3, 5]
    assert (windows.num_tokens, windows.num_bytes, windows.num_documents) == (8, 80, 1)


def test_padding_and_order_by_length(make_shard: MakeShard) -> None:
    windows = evaluation_windows(make_shard([[0, 1], [0, 2, 3, 4, 5, 6], [0, 7, 8]]), context=4, max_tokens=100)
    whole = windows.batch(slice(None))
    assert whole["token_ids"].tolist() == [[0, 2, 3, 4], [0, 4, 5, 0], [0, 7, 0, 0], [0, 0, 0, 0]]
    assert whole["target_ids"].tolist() == [[2, 3, 4, 5], [4, 5, 6, 0], [7, 8, 0, 0], [1, 0, 0, 0]]
    assert whole["valid"].sum(axis=1).tolist() == [4, 3, 2, 1]
    assert whole["scored"].sum(axis=1).tolist() == [4, 1, 2, 1]
    assert windows.document.tolist() == [1, 1, 2, 0]
    part = windows.batch(slice(2, 4))  # no longer than its longest
    assert part["token_ids"].tolist() == [[0, 7], [0, 0]] and part["valid"].tolist() == [[True, True], [True, False]]


def test_the_end_of_an_answer_is_scored(make_shard: MakeShard) -> None:
    """A pair of as many tokens as the context is one window, whose last target is the BOS that ends it."""
    shard = replace(make_shard([[0, 1, 9, 2], [0, 9, 3, 4, 5], [0, 6, 7, 9, 8]]), separator=9)
    windows = evaluation_windows(shard, context=5, max_tokens=100)
    whole = windows.batch(slice(None))
    assert whole["token_ids"].tolist() == [[0, 9, 3, 4, 5], [0, 6, 7, 9, 8], [0, 1, 9, 2, 0]]
    assert whole["target_ids"].tolist() == [[9, 3, 4, 5, 0], [6, 7, 9, 8, 0], [1, 9, 2, 0, 0]]
    assert whole["scored"].astype(int).tolist() == [[0, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 1, 1, 0]]
    assert windows.num_tokens == 4 + 2 + 2
    # What is asked for are answers' tokens: the first pair has two, its end included.
    assert [evaluation_windows(shard, 5, most).num_documents for most in (1, 2, 3, 6, 7, 8, 9)] == [1, 1, 2, 2, 3, 3, 3]


def test_whole_documents_until_max_tokens(make_shard: MakeShard) -> None:
    shard = make_shard([[0, 1, 2, 3], [0], [0, 4, 5], [0, 6]])
    assert evaluation_windows(shard, 8, 3).num_documents == 1
    windows = evaluation_windows(shard, 8, 4)
    assert (windows.num_tokens, windows.num_bytes, windows.num_documents) == (5, 50, 2)  # the empty one has no window


def test_domains_follow_their_tokens(make_shard: MakeShard) -> None:
    windows = evaluation_windows(make_shard([[0, 1, 2, 3, 4, 5, 6], [0, 9]]), 4, 100)
    whole = replace(windows, domain_ids=windows.shard.tokens * 10 + 1).batch(slice(None))
    assert whole["token_ids"].tolist() == [[0, 1, 2, 3], [0, 3, 4, 5], [0, 0, 0, 0]]
    assert whole["domain_ids"].tolist() == [[1, 11, 21, 31], [1, 31, 41, 51], [1, 0, 0, 0]]
    assert not windows.batch(slice(None))["domain_ids"].any()
    with pytest.raises(ValueError, match="domain ids for"):
        replace(windows, domain_ids=np.zeros(8))


def test_refuses(make_shard: MakeShard) -> None:
    with pytest.raises(ValueError, match="must be at least 2"):
        evaluation_windows(make_shard([[0, 1]]), 1, 1)
    with pytest.raises(ValueError, match="no token to score"):
        evaluation_windows(make_shard([[0]]), 4, 1)


def one_by_one(shard: TokenShard, domains: np.ndarray, context: int) -> list[tuple[list[int], ...]]:
    """Each window's inputs, targets, which of them are scored, and domains, written down token by token."""
    rows = []
    for index in range(shard.num_documents):
        begin, end = shard.offsets[index : index + 2].tolist()
        tokens = shard.tokens[begin:end].tolist() + ([] if shard.separator is None else [0])
        answered = [t > 0 and (shard.separator is None or shard.separator in tokens[:t]) for t in range(len(tokens))]
        start = covered = 1
        while covered < len(tokens):
            places = list(range(start, min(start + context, len(tokens))))
            inputs = [0, *places[:-1]]
            rows.append(
                (
                    [tokens[place] for place in inputs],
                    [tokens[place] for place in places],
                    [int(place >= covered and answered[place]) for place in places],
                    [int(domains[begin + place]) for place in inputs],
                )
            )
            covered, start = start + context, start + context // 2
    return sorted(rows, key=lambda row: -len(row[0]))


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(lambda ns: max(ns) > 3),
    st.integers(2, 17),
    st.sampled_from([None, 7]),
    st.integers(1, 5),
)
def test_batches_are_the_windows_one_by_one(lengths: list[int], context: int, separator: int | None, rows: int) -> None:
    rng = np.random.default_rng(sum(lengths))
    documents = [[0, *rng.integers(1, 50, size=n - 1)] for n in lengths]
    if separator is not None:
        context = max(context, max(lengths) + 2)  # a pair fits
        documents = [[*document, separator, 5] for document in documents]
    shard = TokenShard(
        np.concatenate(documents), np.cumsum([0, *map(len, documents)]), np.ones(len(documents)), separator
    )
    domains = rng.integers(0, 9, size=shard.num_tokens)
    windows = replace(evaluation_windows(shard, context, 10**6), domain_ids=domains)
    found = []
    for first in range(0, len(windows), rows):
        batch = windows.batch(slice(first, first + rows))
        names = ("token_ids", "target_ids", "scored", "domain_ids")
        for row, length in enumerate(batch["valid"].sum(axis=1)):
            found.append(tuple(batch[name][row, :length].astype(int).tolist() for name in names))
            assert not any(batch[name][row, length:].any() for name in (*names, "valid"))
    expected = one_by_one(shard, domains, context)
    assert found == expected and windows.num_tokens == sum(sum(row[2]) for row in expected)


def _scored_positions(windows: EvaluationSet, document: int) -> dict[int, int]:
    """Return for each scored position of a document how many of its tokens the window shows before it."""
    found: dict[int, int] = {}
    scored = windows.batch(slice(None))["scored"]
    for row in np.flatnonzero(windows.document == document):
        for column in np.flatnonzero(scored[row]):
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
    batch = windows.batch(slice(None))
    token_ids, target_ids, valid, scored = (batch[name] for name in ("token_ids", "target_ids", "valid", "scored"))
    assert (batch["evidence"] == scored).all()
    assert (token_ids[:, 0] == 0).all()
    assert scored.sum() == windows.num_tokens and not (scored & ~valid).any()
    assert (target_ids[scored] != 0).all()
    assert (np.diff(valid.sum(axis=1)) <= 0).all()
    assert np.array_equal(token_ids[:, 1:][valid[:, 1:]], target_ids[:, :-1][valid[:, 1:]])
    for index, length in enumerate(lengths):
        found = _scored_positions(windows, index)
        assert sorted(found) == list(range(1, length))
        # At least all but a stride of a full window, or the whole text before the token.
        assert all(shown >= min(position - 1, context - 1 - context // 2) for position, shown in found.items())
