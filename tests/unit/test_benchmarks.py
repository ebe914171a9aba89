"""What the performance benchmarks do beside timing: ratios, the table, what is written. Nothing is timed here."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.performance import __main__ as performance
from tests.benchmarks.performance.__main__ import QUICK, outcome, record, run_part, without_paths
from tests.benchmarks.performance.clock import ratio
from tests.benchmarks.performance.figures import draw, fraction
from tests.benchmarks.performance.goals import PARTS, bound, judged, page, rows

STARTUP = {
    "P11 help": judged(0.16, 0.15, 0.17, "<= 0.5", "s"),
    "P11 config error": judged(2.0, 1.9, 2.1, "<= 1.5", "s"),
}


def test_a_ratio_is_taken_round_by_round() -> None:
    found = ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert (found.ratio, found.low, found.high, found.rounds) == (2.0, 1.0, 3.0, 3)
    assert found.seconds == (4.0, 2.0)
    assert ratio([3.0], [2.0]).low == 1.5
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


def test_a_goal_is_a_most_or_a_least() -> None:
    assert bound("<= 0.5") == (True, 0.5) and bound("≥ 1.15") == (False, 1.15)
    with pytest.raises(ValueError, match="about 3"):
        bound("about 3")
    assert judged(0.9, 0.8, 1.0, ">= 0.9", "x")["met"] and not judged(0.89, 0.8, 1.0, ">= 0.9", "x")["met"]
    assert judged(2.0, 1.0, 3.0, "<= 2", "s")["met"] and not judged(2.1, 1.0, 3.0, "<= 2", "s")["met"]


def test_a_figure_is_drawn_as_a_fraction_of_its_goal() -> None:
    assert fraction(1.0, "<= 2") == 2.0 and fraction(1.0, ">= 2") == 0.5
    assert fraction(0.0, "<= 2") == pytest.approx(1000.0)
    assert fraction(0.0, "<= 0") == 1.0 and fraction(1.0, "<= 0") < 1.0


def test_the_page_says_what_it_was_measured_on() -> None:
    run = {"gpu": None, "cpu": "C", "cores": 2, "torch": "2", "commit": "abc", "date": "2026-01-02T03", "command": "it"}
    parts = {"startup": {"goals": STARTUP, "run": run | {"dirty": False}}, "text": {"not_measured": "no", "run": run}}
    parts["text"]["run"] = run | {"dirty": True}
    lines = page(parts).splitlines()
    assert lines[2] == "| P9 (text) | not measured: no |  |  |  |"
    assert lines[3] == "| P11 help (startup) | 0.16 s | 0.15 – 0.17 | <= 0.5 s | yes |"
    assert lines[-2:] == [
        "text: commit `abc` with changes, 2026-01-02, C, 2 cores, torch 2, `it`.",
        "startup: commit `abc`, 2026-01-02, C, 2 cores, torch 2, `it`.",
    ]


def test_rows_say_what_was_not_measured() -> None:
    found = rows(
        {
            "startup": {"goals": STARTUP},
            "step": {"goals": {"P1": judged(1.3, 1.2, 1.4, ">= 1.15", "x")}},
            "profile": {"not_measured": "there is no such part yet"},
            "growth_curves": {"goals": {}},
            "layer": {"not_measured": "ValueError: no"},
        }
    )
    assert found == [
        ("P1 (step)", "1.3 x", "1.2 – 1.4", ">= 1.15 x", "yes"),
        ("P1b (step)", "not measured: the part does not report it", "", "", ""),
        ("P5 (step)", "not measured: the part does not report it", "", "", ""),
        ("P2 (layer)", "not measured: ValueError: no", "", "", ""),
        ("growth_curves", "curves only", "", "", ""),
        ("profile", "not measured: there is no such part yet", "", "", ""),
        ("P11 help (startup)", "0.16 s", "0.15 – 0.17", "<= 0.5 s", "yes"),
        ("P11 config error (startup)", "2 s", "1.9 – 2.1", "<= 1.5 s", "NO"),
    ]


def test_what_a_part_printed_is_its_last_line() -> None:
    assert outcome(0, 'a library greets\n{"goals": {}, "detail": {"a": 1}}\n', "") == {"goals": {}, "detail": {"a": 1}}
    for printed in ("", "no JSON", "[1]", "{}"):
        assert outcome(0, printed, "") == {"not_measured": "the part printed no result"}
    failed = outcome(1, "", "Traceback\nOSError: /home/somebody/data/text.bin is missing\n\n")
    assert failed == {"not_measured": "OSError: …/text.bin is missing"}
    assert outcome(-9, '{"goals": {}}', "") == {"not_measured": "exit code -9"}


def test_a_part_that_is_not_there_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_part("nothing_of_the_kind") == {"not_measured": "there is no such part yet"}


def test_urls_and_ratios_keep_their_slashes() -> None:
    text = "tokens/s, 3 / 4, https://example.org/a/b"
    assert without_paths(text) == text


def test_keeping_replaces_only_the_parts_that_ran(tmp_path: Path) -> None:
    path = tmp_path / "docs" / "cpu.json"
    record(path, {"text": {"goals": {}, "detail": 1}, "startup": {"goals": STARTUP}}, keep=False)
    record(path, {"text": {"goals": {}, "detail": 2}, "step": {"not_measured": "x"}}, keep=True)
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    assert list(parts) == ["step", "text", "startup"] == [name for name in PARTS if name in parts]
    assert parts["text"]["detail"] == 2 and parts["startup"]["goals"] == STARTUP
    record(path, {"text": {"goals": {}}}, keep=False)
    assert list(json.loads(path.read_text(encoding="utf-8"))["parts"]) == ["text"]


def test_figures_of_what_there_is(tmp_path: Path) -> None:
    curves = {"experts": [[8, 1.0, 0.9], [16, 1.1, 0.9]], "frozen_stages": [[0, 1.0, 2**20], [4, 1.0, 2**21]]}
    shares = {"shares": {"step": {"a": 0.7, "b": 0.3}, "decoding": {"b": 1.0}}}
    parts = {"startup": {"goals": STARTUP}, "growth_curves": {"goals": {}, "detail": curves}}
    assert draw({"parts": {"step": {"not_measured": "x"}}}, tmp_path, "cpu") == []
    drawn = draw({"parts": {**parts, "profile": {"goals": {}, "detail": shares}}}, tmp_path, "cpu")
    assert [path.name for path in drawn] == ["cpu-goals.png", "cpu-growth.png", "cpu-profile.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_a_quick_bench_prints_its_parts_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(performance, "run_part", lambda name: asked.append(name) or {"goals": STARTUP})
    monkeypatch.setattr(performance, "record", lambda *_: pytest.fail("it writes"))
    monkeypatch.setattr("sys.argv", ["performance", "--quick"])
    assert performance.main() == 1  # these parts report other goals than those
    assert tuple(asked) == QUICK and "P11 help" in capsys.readouterr().out
