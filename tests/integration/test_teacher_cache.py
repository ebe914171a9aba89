"""A run that keeps what its teacher said: fewer questions, the same loss, and the same bits when it is broken off."""

from __future__ import annotations

from pathlib import Path

import pytest

from lifelong_moe.retention.teacher_cache import TeacherCache
from lifelong_moe.training.loop import module
from tests.tiny import CONTEXT, hashes, tiny_config, train, write_config

CACHED = "trainer.cache_teacher=true"


@pytest.fixture
def asked(lab: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Questions so far; the buffer of old text is so small that its blocks come again."""
    distil, replay = {"weight": 1.0, "text": "replay"}, {"fraction": 0.5, "buffer_tokens": 3 * CONTEXT + 1}
    config = tiny_config()
    config["stage_defaults"] |= {"distill": distil, "replay": replay}
    write_config(config)
    numbers, original = [0, 0], TeacherCache.hidden

    def counted(self: TeacherCache, block_N, ask):  # type: ignore[no-untyped-def]
        def one(i: int):  # type: ignore[no-untyped-def]
            numbers[1] += 1
            if numbers[1] == numbers[0]:
                raise ConnectionError("the teacher left")
            return ask(i)

        return original(self, block_N, one)

    monkeypatch.setattr(module.TeacherCache, "hidden", counted)
    return numbers


def test_blocks_that_come_again_are_not_asked_about(asked: list[int], lab: Path) -> None:
    cached_report, _ = train("tiny.yaml", CACHED)
    assert asked[1] == 3  # of 24 distilled sequences
    cached = hashes()
    _, printed = train()
    assert "Nothing to train" in printed  # the stages are the same ones
    (lab / "mlruns").rename(lab / "cached")
    plain, _ = train()
    assert asked[1] == 3
    for ours, theirs in zip(cached_report["loss_nats_per_token"], plain["loss_nats_per_token"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    (lab / "mlruns").rename(lab / "plain")
    asked[:] = [2, 0]
    with pytest.raises(ConnectionError):
        train("tiny.yaml", CACHED)
    asked[:] = [0, 0]
    train("tiny.yaml", CACHED)
    assert hashes() == cached
