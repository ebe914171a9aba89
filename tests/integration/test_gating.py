"""What the gate is told about a version, and what a person reads of its power."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lifelong_moe.retraining.decision import Action as Decision
from lifelong_moe.retraining.predicted import Power
from lifelong_moe.store.versions import Action, Version, VersionStage
from pipelines.retrain.plan_file import Decided, PlanFacts, Serving
from pipelines.retrain.render import plan_sentences
from pipelines.versions.gating import kinds_of_text


def test_what_continues_a_stage_is_of_its_kind() -> None:
    continues = {"fruit": None, "code": None, "more": "code", "again": "more", "fruit-2": "fruit"}
    data = {"fruit": "fruit", "code": "python", "more": "batch-1", "again": "batch-2", "fruit-2": "fruit"}
    actions: dict[str, Action] = {"more": "continue", "again": "continue"}
    stages = [
        VersionStage(name=name, key=name, data=data[name], action=actions.get(name, "base")) for name in continues
    ]
    stages.append(VersionStage(name="fruit.dropped", key="derived", data="fruit", action="drop"))
    version = Version(id=0, at="", kind="base", reason="", before=None, stages=tuple(stages))
    store: Any = SimpleNamespace(get=lambda key: SimpleNamespace(spec=SimpleNamespace(continues=continues[key])))
    assert kinds_of_text(version, store) == {
        "fruit": "fruit", "python": "python", "batch-1": "python", "batch-2": "python",
    }  # fmt: skip


def sentences(power: Power | None) -> list[str]:
    champion, decision = Serving(0, "cd"), Decided(Decision.skip)
    facts = PlanFacts(
        expires="", champion=champion, batch="ab", settings="", decision=decision, stage=None, exceeded=[], power=power
    )
    return plan_sentences(facts)[1:]


def test_a_plan_says_how_often_its_gate_would_pass_what_does_no_harm() -> None:
    assert sentences(Power(0.934, 3, "wiki, code", 0.95)) == [
        "This gate would pass a harmless candidate 93 times of 100 (3 check(s) of old text)."
    ]
    assert sentences(Power(0.2, 3, "wiki, code", 0.31)) == [
        "Warning: this gate would pass a harmless candidate 20 times of 100 (3 check(s) of old text): of wiki, code "
        "alone 31. Hold out more sources of it, or raise evaluate.tokens or gate.tolerance."
    ]
    assert sentences(None) == []
