"""What a distribution's best loss is counted from, with measurements made up."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from lifelong_moe.evaluation.measurements import Measurements
from lifelong_moe.store.head import BestLoss
from lifelong_moe.store.versions import Action, VersionStage
from pipelines.versions.gating import best_losses, updated_best

NATS = {
    ("a", "fruit"): 1.0, ("b", "fruit"): 1.25, ("c", "fruit"): 1.5,
    ("b", "code"): 2.0, ("c", "code"): 1.5, ("c", "also"): 3.0, ("a", "also"): 1.0,
}  # fmt: skip
CORPORA = {name: SimpleNamespace(heldout_hash=name) for name in ("fruit", "code", "also", "new")}


def stage(key: str, data: str, action: Action = "base") -> VersionStage:
    return VersionStage(name=f"stage-{key}", key=key, data=data, action=action)


def trainer_of(*stages: VersionStage, gone: str = "") -> tuple[Any, io.StringIO]:
    """A champion of these stages; ``gone`` is not in the store any more."""
    printed = io.StringIO()
    trainer = SimpleNamespace(
        champion=SimpleNamespace(stages=stages),
        parent=SimpleNamespace(key=stages[-1].key),
        store=SimpleNamespace(find=lambda key: None if key == gone else SimpleNamespace(key=key)),
        console=Console(file=printed, width=200),
    )
    return trainer, printed


class MadeUp(Measurements):
    def losses(self, model: str, distribution: str, *, shuffled: bool = False) -> Any:
        return SimpleNamespace(nats_per_token=NATS.get((model, distribution), 9.0))


def candidate_of(*names: str) -> Any:
    config: Any = SimpleNamespace(evaluated=names)
    data: Any = SimpleNamespace(records=CORPORA, heldout={"fruit": 0, "code": 0, "also": 0, "new": 0})
    nothing: Any = None
    return SimpleNamespace(measurements=MadeUp(config, data, nothing, nothing, nothing, nothing))


def test_what_has_no_held_out_text_is_left_out_and_said() -> None:
    candidate = candidate_of("fruit", "moss", "code", "new")
    found = candidate.measurements
    assert found.measurable() == ["fruit", "code", "new"] and found.measurable(without=["new"]) == ["fruit", "code"]
    said = "moss is not measured: its text is gone, and no held-out text of it was kept."
    assert found.unmeasurable() == [said]
    trainer, _ = trainer_of(stage("a", "fruit"), stage("m", "moss"), stage("c", "code"))
    assert "moss" not in best_losses(trainer, candidate, {})


def test_the_best_begins_with_the_stage_that_learned_it() -> None:
    """By hand: fruit was learned at 1.0 and is at 1.5 now; code got better; what no stage learned begins now."""
    trainer, printed = trainer_of(stage("a", "fruit"), stage("b", "code"), stage("c", "news", "grow"))
    best = best_losses(trainer, candidate_of("fruit", "code", "also", "new"), {})
    assert {name: (one.key, one.nats) for name, one in best.items()} == {
        "fruit": ("a", 1.0), "code": ("c", 1.5), "also": ("c", 3.0), "new": ("c", 9.0),
    }  # fmt: skip
    assert printed.getvalue() == ""


def test_a_head_of_an_earlier_version_is_set_right_and_a_better_one_stays() -> None:
    trainer, _ = trainer_of(stage("a", "fruit"), stage("b", "code"), stage("c", "news", "grow"))
    before = {
        "fruit": BestLoss(key="c", heldout="fruit", nats=1.5), "code": BestLoss(key="x", heldout="code", nats=0.5),
    }  # fmt: skip
    best = best_losses(trainer, candidate_of("fruit", "code"), before)
    assert (best["fruit"].key, best["code"].key) == ("a", "x")
    assert best == updated_best(candidate_of("fruit", "code").measurements, trainer.parent, best, ["fruit", "code"])


def test_what_cannot_be_measured_any_more_is_left_out_and_said() -> None:
    trainer, printed = trainer_of(stage("a", "fruit"), stage("b", "code"), stage("c", "fruit", "drop"), gone="a")
    best = best_losses(trainer, candidate_of("fruit", "code"), {})
    assert (best["fruit"].key, best["fruit"].nats) == ("c", 1.5)
    said = "Stage stage-a is not in the store any more: the best that fruit ever had is counted without it."
    assert printed.getvalue().strip() == said
