"""Blocks as tensors, through a DataLoader too."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lifelong_moe.data.tokens.blocks import BlockDataset, BlockSource, RowSource
from lifelong_moe.data.tokens.order import SampleOrder, StepBatchSampler
from lifelong_moe.data.tokens.packing import block_borders, epochs
from lifelong_moe.data.tokens.shards import TokenShard

MakeShard = Callable[[Sequence[Sequence[int]]], TokenShard]


def test_block(make_shard: MakeShard) -> None:
    shard = make_shard([[0, 5, 6], [0, 7], [0, 8, 9, 10]])  # 0 5 6 0 7 0 8 9 10
    source = BlockSource(shard, context=4, bos_id=0, domain_ids=np.arange(9, dtype=np.int32))
    assert len(source) == 3
    found = [source.documents(blocks).tolist() for blocks in ([0], [1], [2], [2, 0])]
    assert found == [[0, 1], [1, 2], [2], [0, 1, 2]]
    first, second, rest = (source.block(i) for i in range(3))
    assert first["token_ids"].tolist() == [0, 5, 6, 0]
    assert first["target_ids"].tolist() == [5, 6, 0, 7]
    assert first["document_ids"].tolist() == [1, 1, 1, 2]
    assert first["domain_ids"].tolist() == [0, 1, 2, 3]
    assert second["token_ids"].tolist() == [7, 0, 8, 9]
    assert second["document_ids"].tolist() == [0, 1, 1, 1]
    assert second["domain_ids"].tolist() == [4, 5, 6, 7]
    # What is left is read as well: after the last document its end, and then padding.
    assert rest["token_ids"].tolist() == [10, 0, 0, 0] and rest["target_ids"].tolist() == [0, 0, 0, 0]
    assert rest["document_ids"].tolist() == [0] * 4 and rest["domain_ids"].tolist() == [8, 0, 0, 0]
    assert rest["mask"].tolist() == rest["scored"].tolist() == [True, False, False, False]
    for block in (first, second):
        assert bool(block["scored"].all()) and bool(block["mask"].all())
    kinds = {name: tensor.dtype for name, tensor in first.items()}
    assert kinds.pop("mask") == kinds.pop("scored") == torch.bool and set(kinds.values()) == {torch.int64}
    for index in (-1, 3):
        with pytest.raises(IndexError):
            source.block(index)


def test_block_refuses(make_shard: MakeShard) -> None:
    shard = make_shard([[0, 1, 2, 3]])
    with pytest.raises(ValueError, match="for 4 tokens"):
        BlockSource(shard, 2, 0, np.zeros(3))
    with pytest.raises(ValueError, match="context=0"):
        len(BlockSource(shard, 0, 0))


def test_four_tokens_fill_a_block_of_four(make_shard: MakeShard) -> None:
    shard = make_shard([[0, 1, 2, 3]])
    assert [len(BlockSource(shard, context, 0)) for context in (2, 3, 4, 5)] == [2, 2, 1, 1]
    block = BlockSource(shard, 4, 0).block(0)
    assert block["target_ids"].tolist() == [1, 2, 3, 0] and bool(block["mask"].all())


def test_every_token_is_read_once(make_shard: MakeShard) -> None:
    documents = [[0, 1, 2], [0, 3, 4, 5, 6, 7, 8, 9], [0, 10], [0, 11, 12]]
    for context in range(1, 20):
        source = BlockSource(make_shard(documents), context, 0)
        blocks = [source.block(i) for i in range(len(source))]
        inputs = [t for block in blocks for t in block["token_ids"][block["mask"]].tolist()]
        targets = [t for block in blocks for t in block["target_ids"][block["scored"]].tolist()]
        text = [token for document in documents for token in document]
        assert inputs == text and targets == [*text[1:], 0]


def pairs(make_shard: MakeShard, documents: Sequence[Sequence[int]]) -> TokenShard:
    """99 stands between prompt and answer."""
    return dataclasses.replace(make_shard(documents), separator=99)


def test_pairs_stay_whole(make_shard: MakeShard) -> None:
    documents = [[0, 1, 99, 2], [0, 3, 99, 4, 5], [0, 6, 99, 7], [0, 8, 9, 99, 10, 11]]
    source = BlockSource(pairs(make_shard, documents), 9, 0, np.arange(19))
    first, second = source.block(0), source.block(1)  # two pairs of 4 + 5 tokens fill a block, 4 + 6 do not fit
    assert len(source) == 3
    assert first["token_ids"].tolist() == [0, 1, 99, 2, 0, 3, 99, 4, 5] and bool(first["mask"].all())
    assert first["document_ids"].tolist() == [1] * 4 + [2] * 5
    # An answer's tokens and its end are scored, whatever comes next.
    assert first["target_ids"][first["scored"]].tolist() == [2, 0, 4, 5, 0]
    assert second["token_ids"].tolist() == [0, 6, 99, 7, 0, 0, 0, 0, 0]
    assert second["mask"].tolist() == [True] * 4 + [False] * 5 and second["document_ids"].tolist() == [1] * 9
    assert second["domain_ids"].tolist() == [9, 10, 11, 12, 0, 0, 0, 0, 0]
    assert second["target_ids"][second["scored"]].tolist() == [7, 0]
    assert source.block(2)["target_ids"][source.block(2)["scored"]].tolist() == [10, 11, 0]


@given(st.lists(st.integers(3, 12), min_size=1, max_size=30), st.integers(12, 40))
def test_no_answer_lacks_the_beginning_of_its_pair(lengths: list[int], context: int) -> None:
    documents = [[0, 1, 99, *range(2, length - 1)] for length in lengths]
    tokens = np.array([token for document in documents for token in document])
    shard = TokenShard(tokens, np.cumsum([0, *lengths]), np.ones(len(lengths), dtype=np.int64), separator=99)
    source = BlockSource(shard, context, 0)
    blocks = [source.block(i) for i in range(len(source))]
    assert [t for block in blocks for t in block["token_ids"][block["mask"]].tolist()] == tokens.tolist()
    assert sum(int(block["scored"].sum()) for block in blocks) == sum(lengths) - 2 * len(lengths)
    for block in blocks:
        assert block["token_ids"][0] == 0 and int(block["document_ids"].min()) == 1
    # No block could have held the next pair too.
    sizes = [int(block["mask"].sum()) for block in blocks]
    firsts = [len(lengths_of) for lengths_of in _split(lengths, sizes)]
    begins = np.cumsum([0, *firsts])[1:-1]
    assert all(size + lengths[i] > context for size, i in zip(sizes, begins, strict=False))


def _split(lengths: list[int], sizes: list[int]) -> list[list[int]]:
    rest, parts = list(lengths), []
    for size in sizes:
        part: list[int] = []
        while sum(part) < size:
            part.append(rest.pop(0))
        assert sum(part) == size
        parts.append(part)
    return parts


def test_a_pair_that_does_not_fit(make_shard: MakeShard) -> None:
    with pytest.raises(ValueError, match="the pair at token 3 is longer than context=3"):
        block_borders(pairs(make_shard, [[0, 99, 1], [0, 1, 99, 2]]), 3)


def test_epochs_count_blocks(make_shard: MakeShard) -> None:
    """Ten blocks of text are once, nine tokens of padding included; so are three of pairs, in which 8 are padding."""
    assert epochs(100, make_shard([[0, *range(1, 91)]]), 10) == 1.0
    documents = [[0, 1, 99, 2], [0, 3, 99, 4, 5], [0, 6, 99, 7], [0, 8, 9, 99, 10, 11]]
    assert epochs(27, pairs(make_shard, documents), 9) == 1.0


def test_a_limit_keeps_the_first_blocks(make_shard: MakeShard) -> None:
    shard = make_shard([[0, *range(1, 20)]])  # 20 tokens: 10 blocks of 2
    whole = BlockSource(shard, 2, 0)
    assert [len(BlockSource(shard, 2, 0, limit=limit)) for limit in (None, 3, 100)] == [10, 3, 10]
    first = BlockSource(shard, 2, 0, limit=3)
    assert all(torch.equal(first.block(i)["target_ids"], whole.block(i)["target_ids"]) for i in range(3))
    with pytest.raises(IndexError, match="block 3 of 3"):
        first.block(3)


def test_rows_stand_apart() -> None:
    rows = np.array([[0, 5, 0, 6, 7], [0, 8, 9, 9, 0]])
    domains = np.array([[1, 1, 2, 2, 3], [4, 4, 4, 4, 5]])
    source = RowSource(rows, 0, domains, domains + 10)
    assert len(source) == 2
    first, second = source.block(0), source.block(1)
    assert first["token_ids"].tolist() == [0, 5, 0, 6] and first["target_ids"].tolist() == [5, 0, 6, 7]
    assert first["document_ids"].tolist() == [1, 1, 2, 2]
    assert first["domain_ids"].tolist() == [1, 1, 2, 2] and first["teacher_domain_ids"].tolist() == [11, 11, 12, 12]
    assert second["token_ids"].tolist() == [0, 8, 9, 9] and second["target_ids"].tolist() == [8, 9, 9, 0]
    assert RowSource(rows, 0).block(1)["domain_ids"].tolist() == [0] * 4


def test_rows_are_replayed_like_blocks(make_shard: MakeShard) -> None:
    new = BlockSource(make_shard([[0, *range(1, 20)]]), 4, 0)
    rows = np.array([[0, 50, 51, 52, 53], [0, 60, 61, 62, 63]])
    dataset = BlockDataset([new, RowSource(rows, 0)], SampleOrder([len(new), 2], 0.5, seed=0))
    samples = [dataset[n] for n in range(4)]
    assert [bool(sample["replayed"]) for sample in samples] == [False, True, False, True]
    assert sorted(sample["token_ids"][1].item() for sample in samples[1::2]) == [50, 60]


def _dataset(make_shard: MakeShard) -> BlockDataset:
    new = BlockSource(make_shard([[0, *range(1, 20)], [0, *range(20, 50)]]), 8, 0)
    old = BlockSource(make_shard([[0, *range(100, 130)]]), 8, 0)
    return BlockDataset([new, old], SampleOrder([len(new), len(old)], 0.25, seed=3))


def test_dataset(make_shard: MakeShard) -> None:
    dataset = _dataset(make_shard)
    assert [bool(dataset[n]["replayed"]) for n in range(8)] == [False, False, False, True] * 2
    assert dataset[3]["token_ids"][1:].min() >= 100
    assert dataset[0]["domain_ids"].tolist() == [0] * 8
    assert torch.equal(dataset[50]["token_ids"], dataset[50]["token_ids"])


def test_workers_change_nothing(make_shard: MakeShard) -> None:
    dataset = _dataset(make_shard)
    sampler = StepBatchSampler(num_steps=4, global_batch=4, accumulate=2)
    runs = [
        list(DataLoader(dataset, batch_sampler=sampler, num_workers=workers, multiprocessing_context=context))
        for workers, context in ((0, None), (2, "fork"))
    ]
    assert len(runs[0]) == len(runs[1]) == 8
    for one, other in zip(*runs, strict=True):
        assert one["token_ids"].shape == (2, 8)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_what_a_sample_counts_is_known_without_its_text(make_shard: MakeShard) -> None:
    """Pairs of three and of nine tokens, of which two and seven come before an answer's token or its end; and rows."""
    pairs = make_shard([[0, 99, 5], [0, 7, 99, 1, 2, 3, 4, 5, 6]] * 4)
    new = BlockSource(replace(pairs, separator=99), 9, 0)
    old = RowSource(np.arange(1, 31).reshape(3, 10), 0)
    dataset = BlockDataset([new, old], SampleOrder([len(new), len(old)], 0.4, seed=1))
    samples = [dataset[n] for n in range(30)]
    sizes = [(int(sample["mask"].sum()), int(sample["scored"].sum())) for sample in samples]
    assert [dataset.sizes(n) for n in range(30)] == sizes
    assert [(new.num_real(i), new.num_scored(i)) for i in range(len(new))] == [(3, 2), (9, 7)] * 4
    assert [dataset.place(n) for n in range(30)] == [(bool(s["replayed"]), int(s["ordinal"])) for s in samples]
    assert [int(sample["sample"]) for sample in samples] == list(range(30))
