"""Heads and ledgers of runs, as files."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lifelong_moe.errors import ConfigError, CorruptError
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import (
    OpenRun,
    RunRecord,
    latest_timestamp,
    require_head,
    timestamp,
    trained_by,
)

KEYS = ("1" * 64, "2" * 64)
HEAD = RunHead(run="r", method="lifelong", seed=0, config={}, names=("a", "b"), plan=KEYS, stages=KEYS[:1])


def test_times_are_utc_in_seconds_and_clocks_may_be_a_day_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timestamp(0) == "1970-01-01T00:00:00Z" and timestamp(86399.9) == "1970-01-01T23:59:59Z"
    monkeypatch.setattr(time, "time", lambda: 1_000_000_000.0)
    assert latest_timestamp() == "2001-09-10T01:46:40Z"  # of 2001-09-09T01:46:40Z


def test_the_ledger_is_read_by_event_and_what_is_no_line_of_it_is_passed_over(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, "r")
    assert record.logged("stage", "key") == []
    record.log("stage", key="k1")
    record.log("tick", key="other")
    with (record.path / "ledger.jsonl").open("a") as file:
        file.write('5\n["stage"]\n"stage"\n{"event":"stage"}\n{"event":"stage","ke')  # killed here
    record.log("stage", key="k2")
    assert record.logged("stage", "key") == ["k1", None, "k2"]
    lines = (record.path / "ledger.jsonl").read_text().splitlines()
    assert len(lines) == 8 and all(json.loads(line)["time"].endswith("Z") for line in (lines[0], lines[-1]))


def test_a_head_is_what_was_set_and_one_that_is_missing_or_none_is_said(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, "r")
    assert record.head() is None and record.report(dict) is None
    with pytest.raises(ConfigError, match=r"run r does not exist under .*There are none yet\."):
        require_head(tmp_path, "r")
    record.set_head(HEAD)
    record.set_report({"x": 1})
    assert require_head(tmp_path, "r") == HEAD == record.head() and record.report(dict) == {"x": 1}
    with pytest.raises(ConfigError, match=r"run q does not exist under .*There are r\."):
        require_head(tmp_path, "q")
    opened = OpenRun(record, HEAD)
    opened.save(HEAD.with_committed(KEYS[1]))
    assert record.head() == opened.head == HEAD.with_committed(KEYS[1])
    for text, message in (
        ("[]", "not the head of a run"),
        ('{"schema": 2}', "written by a later version of lifelong-moe"),
    ):
        (record.path / "head.json").write_text(text)
        with pytest.raises(CorruptError, match=rf"runs/r/head\.json: {message}"):
            require_head(tmp_path, "r")
    (record.path / "head.json").write_text("{")
    with pytest.raises(CorruptError, match="not JSON"):
        record.head()


def test_who_trained_a_stage_and_a_run_that_cannot_be_read(tmp_path: Path) -> None:
    assert trained_by(tmp_path, KEYS[0]) is None
    RunRecord(tmp_path, "shares").set_head(replace(HEAD, run="shares"))
    RunRecord(tmp_path, "trains").set_head(replace(HEAD, run="trains", trained=KEYS[:1]))
    damaged = RunRecord(tmp_path, "damaged")
    damaged.set_head(HEAD)
    (damaged.path / "head.json").write_text("{")
    found = trained_by(tmp_path, KEYS[0])
    assert found is not None and found.run == "trains"
    assert trained_by(tmp_path, KEYS[1]) is None
