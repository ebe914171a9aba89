"""Domains of chunks that are kept beside the tokens: the main process writes each file, and ranks only read them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lifelong_moe.clustering.chunks import DomainFile
from lifelong_moe.errors import TryAgainError
from lifelong_moe.training.loop.module import StageModule
from tests.tiny import CONTEXT, SEQUENCES, hashes, kill_self, tiny_config, train, write_config

pytestmark = pytest.mark.usefixtures("forked")

STEPS, EVERY = 4, 2


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line for each time that any process writes or finds domains."""
    path, write, find = Path("noted").absolute(), DomainFile.write, DomainFile.find

    def note(what: str, file: DomainFile) -> None:
        with path.open("a") as lines:
            lines.write(f"{what} {os.getpid() == main} {file.path.name}\n")

    def noted_write(self: DomainFile, batches: Any) -> None:
        note("write", self)
        write(self, batches)

    def noted_find(self: DomainFile) -> Any:
        if (found := find(self)) is not None:
            note("find", self)
        return found

    main = os.getpid()
    monkeypatch.setattr(DomainFile, "write", noted_write)
    monkeypatch.setattr(DomainFile, "find", noted_find)
    return path


def told(noted: Path, what: str, *, by_main: bool) -> list[str]:
    """Names of the files that the main process, or a rank, has written or found since the last call."""
    lines = [line.split() for line in noted.read_text().splitlines()]
    return [name for did, was_main, name in lines if (did, was_main) == (what, str(by_main))]


def test_only_the_main_process_writes_them_also_if_a_rank_is_killed(
    lab: Path, noted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(
        trainer={"devices": 2},
        routing={"bundles": "cluster", "chunk_tokens": 8, "mixture": None},
        model={"document_mask": True},
        checkpoint={"every_steps": EVERY},
        stage_defaults={
            "tokens": STEPS * SEQUENCES * CONTEXT,
            "replay": {"fraction": 0.25},
            "distill": {"weight": 1.0},
            "trunk": {"train": "deltas", "rank": 4},
        },
    )
    write_config(config)
    original = StageModule.training_step

    def training_step(self: StageModule, batch: Any, batch_idx: int) -> Any:
        if (self.spec.name, self.global_step, dist.get_rank()) == ("code", EVERY + 1, 1):
            kill_self()
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "training_step", training_step)
        with pytest.raises(TryAgainError, match="ended by SIGKILL"):
            train()
    files = sorted(path.name for path in lab.glob("data/cache/tokens/*/domains-*.bin"))
    # Of the new text and of the old, which is replayed.
    assert len(files) == 2 and sorted(told(noted, "write", by_main=True)) == files
    assert told(noted, "write", by_main=False) == []
    assert {*told(noted, "find", by_main=False)} == {*files}
    noted.unlink()
    _, printed = train()
    assert f"code: continuing from step-0-{EVERY:08d}" in printed
    assert "write" not in noted.read_text() and {*told(noted, "find", by_main=False)} == {*files}
    expected = hashes()
    shutil.rmtree("mlruns")
    shutil.rmtree("data")
    train()
    assert hashes() == expected
    assert files == sorted(path.name for path in lab.glob("data/cache/tokens/*/domains-*.bin"))
