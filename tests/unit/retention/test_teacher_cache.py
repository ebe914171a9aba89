"""What a teacher said is kept by block, exactly, and survives whoever asked."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lifelong_moe.retention.teacher_cache import TeacherCache

CONTEXT, WIDTH = 3, 4


class Teacher:
    """Answers with numbers that tell which block was asked about, and counts."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks, self.asked = blocks, 0

    def __call__(self, position: int) -> Tensor:
        self.asked += 1
        return torch.full((1, CONTEXT, WIDTH), float(self.blocks[position]) + 0.1)


def test_each_block_is_asked_about_once(tmp_path: Path) -> None:
    cache, blocks = TeacherCache(tmp_path / "teacher", CONTEXT), torch.tensor([4, 0, 4])
    teacher = Teacher(blocks)
    found = cache.hidden(blocks, teacher)
    assert found.shape == (3, CONTEXT, WIDTH) and teacher.asked == 2
    assert torch.equal(found[:, 0, 0], blocks.float() + 0.1)
    again = TeacherCache(tmp_path / "teacher", CONTEXT)  # another process goes on
    assert torch.equal(again.hidden(blocks, teacher), found) and teacher.asked == 2


def test_a_block_that_broke_off_is_asked_about_again(tmp_path: Path) -> None:
    def breaks(position: int) -> Tensor:
        raise ConnectionError

    cache, blocks = TeacherCache(tmp_path / "teacher", CONTEXT), torch.tensor([2])
    with pytest.raises(ConnectionError):
        cache.hidden(blocks, breaks)
    teacher = Teacher(blocks)
    cache.hidden(blocks, teacher)
    assert teacher.asked == 1


def test_two_who_open_it_at_once_clear_nothing(tmp_path: Path) -> None:
    first, blocks = TeacherCache(tmp_path / "teacher", CONTEXT), torch.tensor([1])
    second = TeacherCache(tmp_path / "teacher", CONTEXT)
    found, silent = first.hidden(blocks, Teacher(blocks)), Teacher(blocks)
    assert torch.equal(second.hidden(blocks, silent), found) and silent.asked == 0


def test_half_precision_is_kept_exactly(tmp_path: Path) -> None:
    said = torch.randn(1, CONTEXT, WIDTH).bfloat16()
    cache = TeacherCache(tmp_path / "teacher", CONTEXT)
    assert torch.equal(cache.hidden(torch.tensor([3]), lambda _: said), said.float())


def test_a_full_disk_is_an_error_and_marks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, blocks = TeacherCache(tmp_path / "teacher", CONTEXT), torch.tensor([1])

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space"):
            cache.hidden(blocks, Teacher(blocks))
    teacher = Teacher(blocks)
    cache.hidden(blocks, teacher)
    assert teacher.asked == 1
