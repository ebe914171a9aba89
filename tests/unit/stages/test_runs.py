"""Heads, ledgers and evaluations of runs, as files."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.errors import ConfigError, CorruptError
from lifelong_moe.stages.runs import (
    EvaluationStore,
    RunRecord,
    committed_stages,
    latest_timestamp,
    require_head,
    require_stage,
    timestamp,
)

HEAD: dict[str, Any] = {"run": "r", "config": {}, "names": ["a", "b"], "plan": ["k1", "k2"], "stages": ["k1"]}


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
    assert record.head() is None and record.report() is None
    with pytest.raises(ConfigError, match=r"run r does not exist under .*There are none yet\."):
        require_head(tmp_path, "r")
    record.set_head(HEAD)
    record.set_report({"x": 1})
    assert require_head(tmp_path, "r") == HEAD == record.head() and record.report() == {"x": 1}
    with pytest.raises(ConfigError, match=r"run q does not exist under .*There are r\."):
        require_head(tmp_path, "q")
    for name in ("plan", "stages", "names", "config"):
        record.set_head({key: value for key, value in HEAD.items() if key != name})
        with pytest.raises(CorruptError, match="not the head of a run"):
            require_head(tmp_path, "r")
    (record.path / "head.json").write_text("{")
    with pytest.raises(CorruptError, match="not JSON"):
        record.head()


def test_committed_stages_come_in_the_order_of_the_plan() -> None:
    assert committed_stages(HEAD) == {"a": "k1"}
    assert list(committed_stages(HEAD | {"stages": ["k2", "k1"]})) == ["a", "b"]
    both = HEAD | {"stages": ["k1", "k2"]}
    assert (require_stage(both), require_stage(both, "a"), require_stage(HEAD)) == ("k2", "k1", "k1")
    with pytest.raises(ConfigError, match="no committed stage b; there are a"):
        require_stage(HEAD, "b")
    with pytest.raises(ConfigError, match="no committed stage yet"):
        require_stage(HEAD | {"stages": []})


def test_an_evaluation_is_found_by_both_whole_keys(tmp_path: Path) -> None:
    store, stage, data = EvaluationStore(tmp_path), "ab" * 32, "cd" * 32
    assert store.find(stage, data) is None
    store.add(stage, data, {"loss": 1.5})
    assert store.find(stage, data) == {"loss": 1.5}
    assert store.find(stage[:-1] + "0", data) is None and store.find(stage, data[:-1] + "0") is None
    (path,) = store.root.iterdir()
    assert path.name == "abababababababab-cdcdcdcdcdcdcdcd.json"
    for damaged in ("{", "[]", "{}", '{"stage": 1}'):
        path.write_text(damaged)
        assert store.find(stage, data) is None
