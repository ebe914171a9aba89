"""What a stage writes at most, and what is said if there is no room for it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from lifelong_moe.config.run import RunConfig
from lifelong_moe.config.training import CheckpointConfig, FinetuneConfig, TrainerConfig
from lifelong_moe.errors import ResourceError
from lifelong_moe.plan.disk import (
    POINT_BYTES,
    RECORD_BYTES,
    DiskNeed,
    disk_need,
    require_space,
    run_need,
    used_space,
)
from lifelong_moe.plan.methods import stage_specs

RECORDS = RECORD_BYTES + POINT_BYTES
"""Ten steps give one point of the curves."""


@pytest.mark.parametrize(
    ("precision", "every", "keep", "work"),
    [
        ("32-true", 2, 2, 3 * 3 * 400),  # five are taken; two are kept while the third is written
        ("32-true", 2, 9, 5 * 3 * 400),
        ("32-true", 11, 2, 0),  # none is taken in ten steps
        ("auto", 10, 2, 3 * 400),
        ("bf16-mixed", 10, 2, 3 * 400),
        ("bf16-true", 10, 2, 3 * 200),
    ],
)
def test_need_by_hand(make_run: Callable[..., RunConfig], precision: str, every: int, keep: int, work: int) -> None:
    spec = stage_specs(make_run(f"trainer.precision={precision}"))[0]
    assert spec.steps == 10
    need = disk_need(spec, 100, CheckpointConfig(every_steps=every, keep=keep), TrainerConfig())
    assert need == DiskNeed((200 if precision == "bf16-true" else 400) + RECORDS, work)


def test_each_logged_point_takes_room(make_run: Callable[..., RunConfig]) -> None:
    spec = stage_specs(make_run())[0]
    rare, often = (
        disk_need(spec, 100, CheckpointConfig(), TrainerConfig(log_every_n_steps=steps)).stays for steps in (10, 2)
    )
    assert often - rare == 4 * POINT_BYTES


def test_the_best_weights_are_kept_meanwhile(make_run: Callable[..., RunConfig]) -> None:
    spec = dataclasses.replace(stage_specs(make_run())[0], finetune=FinetuneConfig(patience=2))
    assert disk_need(spec, 100, CheckpointConfig(), TrainerConfig()).work == 400


def test_generated_text_is_kept_meanwhile(make_run: Callable[..., RunConfig]) -> None:
    spec = stage_specs(make_run("stage_defaults.replay={fraction: 0.5, source: generated}"))[1]
    assert disk_need(spec, 100, CheckpointConfig(every_steps=50), TrainerConfig()).work == 8 * 320


def test_what_the_teacher_said_is_kept_meanwhile(make_run: Callable[..., RunConfig]) -> None:
    spec = stage_specs(make_run("stage_defaults.distill.weight=1", "stage_defaults.replay.fraction=0.5"))[1]
    plain, more = (
        disk_need(spec, 100, CheckpointConfig(every_steps=50), TrainerConfig(cache_teacher=c)) for c in (False, True)
    )
    assert spec.distilled_tokens > 0 and more.work - plain.work == 4 * spec.model.width * spec.distilled_tokens


def test_stages_in_turn_need_all_weights_and_the_largest_work() -> None:
    assert run_need([DiskNeed(10, 90), DiskNeed(20, 50)]) == 120
    assert run_need([]) == 0


def test_too_little_space_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=2_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    root = tmp_path / "mlruns"  # not there yet
    require_space(root, 2_000_000, "stage wiki")
    with pytest.raises(ResourceError, match=r"^stage wiki needs up to 3.5 MB of disk, but .*/mlruns has 2.0 MB free"):
        require_space(root, 3_500_000, "stage wiki")
    assert asked == [tmp_path, tmp_path]


def test_used_space(tmp_path: Path) -> None:
    assert used_space(tmp_path / "absent") == 0
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"12")
    assert used_space(tmp_path) == 7


def test_holes_take_no_space(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
        file.write(b"12345")
    assert used_space(tmp_path) < 1 << 20
