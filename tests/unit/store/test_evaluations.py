"""Evaluations of stages, as files."""

from __future__ import annotations

from pathlib import Path

from lifelong_moe.store.evaluations import EvaluationStore


def test_an_evaluation_is_found_by_both_whole_keys(tmp_path: Path) -> None:
    store, stage, data = EvaluationStore(tmp_path), "ab" * 32, "cd" * 32
    assert store.find(stage, data, dict) is None
    store.add(stage, data, {"loss": 1.5})
    assert store.find(stage, data, dict) == {"loss": 1.5}
    assert store.find(stage[:-1] + "0", data, dict) is None and store.find(stage, data[:-1] + "0", dict) is None
    (path,) = store.root.iterdir()
    assert path.name == "abababababababab-cdcdcdcdcdcdcdcd.json"
    for damaged in ("{", "[]", "{}", '{"stage": 1}'):
        path.write_text(damaged)
        assert store.find(stage, data, dict) is None
