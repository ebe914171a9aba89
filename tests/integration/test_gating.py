"""What the gate is told about a version, and what a person reads of its power."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lifelong_moe.stages.versions import Action, Version, VersionStage
from pipelines.gating import kinds_of_text
from pipelines.render_retrain import plan_sentences


def test_what_continues_a_stage_is_of_its_kind() -> None:
    continues = {"fruit": None, "code": None, "more": "code", "again": "more", "fruit-2": "fruit"}
    data = {"fruit": "fruit", "code": "python", "more": "batch-1", "again": "batch-2", "fruit-2": "fruit"}
    actions: dict[str, Action] = {"more": "continue", "again": "continue"}
    stages = [
        VersionStage(name=name, key=name, data=data[name], action=actions.get(name, "base")) for name in continues
    ]
    stages.append(VersionStage(name="fruit.dropped", key="derived", data="fruit", action="drop"))
    version = Version(id=0, at="", kind="base", reason="", before=None, stages=tuple(stages))
    store: Any = SimpleNamespace(get=lambda key: SimpleNamespace(config={"spec": {"continues": continues[key]}}))
    assert kinds_of_text(version, store) == {
        "fruit": "fruit", "python": "python", "batch-1": "python", "batch-2": "python",
    }  # fmt: skip


def sentences(**power: Any) -> list[str]:
    facts: dict[str, Any] = {"batch": "ab", "documents": 3, "drift": {}, "decision": {"reasons": []}, "stage": None}
    return plan_sentences({**facts, "exceeded": [], **power})[1:]


def test_a_plan_says_how_often_its_gate_would_pass_what_does_no_harm() -> None:
    power = {"passes": 0.934, "checks": 3, "weakest": "wiki, code", "weakest_passes": 0.95}
    assert sentences(power=power) == [
        "This gate would pass a harmless candidate 93 times of 100 (3 check(s) of old text)."
    ]
    assert sentences(power=power | {"passes": 0.2, "weakest_passes": 0.31}) == [
        "Warning: this gate would pass a harmless candidate 20 times of 100 (3 check(s) of old text): of wiki, code "
        "alone 31. Hold out more sources of it, or raise evaluate.tokens or gate.tolerance."
    ]
    assert sentences(power=None) == sentences() == []  # plans of earlier versions have none
