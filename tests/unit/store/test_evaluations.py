"""Evaluations of stages, as files."""

from __future__ import annotations

from pathlib import Path

from lifelong_moe.storage.plain import PlainError
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


def test_what_is_measured_together_is_one_file_of_which_each_result_is_found(tmp_path: Path) -> None:
    store, stage, data = EvaluationStore(tmp_path), "ab" * 32, [f"{place:064x}" for place in range(4)]
    store.add_together(stage, {key: {"place": place} for place, key in enumerate(data[:2])})
    store.add_together(stage, {key: {"place": place} for place, key in enumerate(data[:3])})
    store.add(stage, data[3], {"place": 3})
    assert len([*store.root.iterdir()]) == 3  # other results never replace a file
    for found in (store, EvaluationStore(tmp_path)):
        assert [found.find(stage, key, dict) for key in data] == [{"place": place} for place in range(4)]
        assert found.find(stage[:-1] + "0", data[0], dict) is None and found.find(stage, "f" * 64, dict) is None
    first, *_ = sorted(store.root.glob(f"{stage[:16]}-together-*.json"))
    first.write_text("{")
    assert EvaluationStore(tmp_path).find(stage, data[0], dict) == {"place": 0}  # the other file has it too

    def only_new(result: object) -> object:
        if result == {"place": 0}:
            raise PlainError("of a model with other experts")
        return result

    # A result that is not believed is measured again, and the new one is found beside it.
    assert store.find(stage, data[0], only_new) is None
    store.add(stage, data[0], {"place": 9})
    assert store.find(stage, data[0], only_new) == {"place": 9}
