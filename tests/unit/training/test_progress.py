"""What a person sees while training, at any width."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lifelong_moe.training.callbacks import progress as callbacks
from lifelong_moe.training.callbacks.progress import ProgressReport, duration


@pytest.mark.parametrize("width", [140, 80, 60])
def test_no_number_beside_the_bar_is_cut(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(callbacks, "BAR_SECONDS", -1.0)
    file = io.StringIO()
    meter: Any = SimpleNamespace(step_tokens=4096, seconds=0.0625)
    report = ProgressReport("english_docs", Console(file=file, force_terminal=True, width=width), True, meter)
    trainer: Any = SimpleNamespace(global_step=1, max_steps=31250)
    module: Any = SimpleNamespace(means=SimpleNamespace(values={"loss": 4.261}))
    report.on_train_start(trainer, trainer)
    report.on_train_batch_end(trainer, module, {}, None, 0)
    assert report._bar is not None
    file.truncate(0)
    report._bar.refresh()
    report.teardown(trainer, trainer, "fit")
    shown = file.getvalue()
    assert all(number in shown for number in ("1/31250", "4.261", "65,536")) and "…" not in shown


def test_names_that_differ_at_the_end_differ_beside_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    meter: Any = SimpleNamespace(step_tokens=4096, seconds=0.0625)
    trainer: Any = SimpleNamespace(global_step=1, max_steps=31250)
    for width, shown in ((80, "wikipedi…-first."), (140, "wikipedia-2024-january-english-first.")):
        file = io.StringIO()
        name = "wikipedia-2024-january-english-first."
        report = ProgressReport(name, Console(file=file, force_terminal=True, width=width), True, meter)
        report.on_train_start(trainer, trainer)
        report.teardown(trainer, trainer, "fit")
        assert shown in file.getvalue()


def test_after_an_error_the_cursor_is_there_again() -> None:
    file = io.StringIO()
    meter: Any = SimpleNamespace(step_tokens=4096, seconds=0.0625)
    report = ProgressReport("english_docs", Console(file=file, force_terminal=True, width=80), True, meter)
    trainer: Any = SimpleNamespace(global_step=1, max_steps=31250)
    report.on_train_start(trainer, trainer)
    assert file.getvalue().rfind("\x1b[?25h") < file.getvalue().rfind("\x1b[?25l")
    report.on_exception(trainer, trainer, KeyboardInterrupt())
    assert file.getvalue().rfind("\x1b[?25h") > file.getvalue().rfind("\x1b[?25l")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (6000, "1 h 40 min"), (172_800, "2 days")],
)
def test_a_time_is_said_in_one_unit_or_two(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(("later", "whole"), [(None, ""), (0.0, ""), (4.5e9, ", 3 min for all stages")])
def test_a_log_says_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch, later: float | None, whole: str) -> None:
    monkeypatch.setattr(callbacks, "LOG_SECONDS", -1.0)
    file = io.StringIO()
    # Two seconds a step, of which 45 are left, and then 45 of three times the cost in all.
    meter: Any = SimpleNamespace(step_tokens=100, step_flops=1e8, seconds=10.0)
    report = ProgressReport("code, stage 2 of 3", Console(file=file, width=140), True, meter, later)
    trainer: Any = SimpleNamespace(global_step=5, max_steps=50)
    module: Any = SimpleNamespace(means=SimpleNamespace(values={"loss": 1.5}))
    report.on_train_start(trainer, trainer)
    report.on_train_batch_end(trainer, module, {}, None, 0)
    assert file.getvalue() == f"code, stage 2 of 3: step 5/50, loss 1.500, 50 tokens/s, 90 s left{whole}\n"
