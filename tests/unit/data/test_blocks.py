"""Blocks as tensors, through a DataLoader too."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lifelong_moe.data.blocks import BlockDataset, BlockSource, RowSource
from lifelong_moe.data.order import SampleOrder, StepBatchSampler
from lifelong_moe.data.shards import TokenShard
from lifelong_moe.errors import DataError

MakeShard = Callable[[Sequence[Sequence[int]]], TokenShard]


def test_block(make_shard: MakeShard) -> None:
    shard = make_shard([[0, 5, 6], [0, 7], [0, 8, 9, 10]])  # 0 5 6 0 7 0 8 9 10
    source = BlockSource(shard, context=4, bos_id=0, group_ids=np.arange(9, dtype=np.int32))
    assert len(source) == 2
    first, second = source.block(0), source.block(1)
    assert first["token_ids"].tolist() == [0, 5, 6, 0]
    assert first["target_ids"].tolist() == [5, 6, 0, 7]
    assert first["document_ids"].tolist() == [1, 1, 1, 2]
    assert first["group_ids"].tolist() == [0, 1, 2, 3]
    assert second["token_ids"].tolist() == [7, 0, 8, 9]
    assert second["document_ids"].tolist() == [0, 1, 1, 1]
    assert second["group_ids"].tolist() == [4, 5, 6, 7]
    assert bool(first.pop("scored").all())
    assert all(tensor.dtype == torch.int64 for tensor in first.values())
    for index in (-1, 2):
        with pytest.raises(IndexError):
            source.block(index)


def test_block_refuses(make_shard: MakeShard) -> None:
    shard = make_shard([[0, 1, 2, 3]])
    assert len(BlockSource(shard, 3, 0)) == 1
    with pytest.raises(DataError, match="too few tokens: one block of context 4 needs 5, the training text has 4"):
        BlockSource(shard, 4, 0)
    with pytest.raises(ValueError, match="for 4 tokens"):
        BlockSource(shard, 2, 0, np.zeros(3))
    with pytest.raises(ValueError, match="context=0"):
        BlockSource(shard, 0, 0)


def test_a_limit_keeps_the_first_blocks(make_shard: MakeShard) -> None:
    shard = make_shard([[0, *range(1, 20)]])  # 20 tokens: 9 blocks of 2
    whole = BlockSource(shard, 2, 0)
    assert [len(BlockSource(shard, 2, 0, limit=limit)) for limit in (None, 3, 100)] == [9, 3, 9]
    first = BlockSource(shard, 2, 0, limit=3)
    assert all(torch.equal(first.block(i)["target_ids"], whole.block(i)["target_ids"]) for i in range(3))
    with pytest.raises(IndexError, match="block 3 of 3"):
        first.block(3)


def test_rows_stand_apart() -> None:
    rows = np.array([[0, 5, 0, 6, 7], [0, 8, 9, 9, 0]])
    groups = np.array([[1, 1, 2, 2, 3], [4, 4, 4, 4, 5]])
    source = RowSource(rows, 0, groups, groups + 10)
    assert len(source) == 2
    first, second = source.block(0), source.block(1)
    assert first["token_ids"].tolist() == [0, 5, 0, 6] and first["target_ids"].tolist() == [5, 0, 6, 7]
    assert first["document_ids"].tolist() == [1, 1, 2, 2]
    assert first["group_ids"].tolist() == [1, 1, 2, 2] and first["teacher_group_ids"].tolist() == [11, 11, 12, 12]
    assert second["token_ids"].tolist() == [0, 8, 9, 9] and second["target_ids"].tolist() == [8, 9, 9, 0]
    assert RowSource(rows, 0).block(1)["group_ids"].tolist() == [0] * 4


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
    assert dataset[0]["group_ids"].tolist() == [0] * 8
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
