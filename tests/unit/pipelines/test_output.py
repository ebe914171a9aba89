"""What a log says of work that takes its time."""

from __future__ import annotations

import io
import re
import threading
import time

import pytest

from pipelines.shared import output
from pipelines.shared.output import SafeConsole


def wait_for(file: io.StringIO, pattern: str) -> None:
    until = time.monotonic() + 30
    while not re.search(pattern, file.getvalue()):
        assert time.monotonic() < until, file.getvalue()
        time.sleep(0.01)


def test_a_log_names_what_is_under_way_and_says_so_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "AGAIN_SECONDS", 0.02)
    file = io.StringIO()
    with SafeConsole(file, patience=0.01, width=80).status("fruit: \x1b[31mevaluating"):
        wait_for(file, r"\(\d+ s\)\n")
    assert file.getvalue().startswith("fruit: \\x1b[31mevaluating …\nfruit: \\x1b[31mevaluating … (0 s)\n")
    said = len(file.getvalue())
    time.sleep(0.1)
    assert len(file.getvalue()) == said


def speakers() -> int:
    """Threads that wait for the time to speak."""
    return sum("_speak" in thread.name for thread in threading.enumerate())


def test_what_is_started_twice_speaks_once() -> None:
    status = SafeConsole(io.StringIO(), patience=60.0, width=80).status("evaluating")
    status.start()
    with status:
        assert speakers() == 1
    assert speakers() == 0
    with status:  # and again after its end
        assert speakers() == 1


@pytest.mark.parametrize("options", [{"patience": 60.0}, {"patience": None}, {"patience": 0.0, "quiet": True}], ids=str)
def test_what_is_quick_or_quiet_is_not_named(options: dict[str, float | bool | None]) -> None:
    file = io.StringIO()
    with SafeConsole(file, width=80, **options).status("evaluating"):
        time.sleep(0.05)
    assert file.getvalue() == ""
