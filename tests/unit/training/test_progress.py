"""What a person sees while training, at any width."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lifelong_moe.training.callbacks import progress as callbacks
from lifelong_moe.training.callbacks.progress import ProgressReport


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
