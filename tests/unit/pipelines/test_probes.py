"""What a probe says, what a tick may spend, and which plans are still carried out. Nothing is trained here."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from lifelong_moe.config.retraining.operation import LimitsConfig
from lifelong_moe.config.retraining.policy import GateConfig, PromoteRule
from lifelong_moe.plan.retraining import RetrainConfig
from lifelong_moe.retraining.bounds import DocumentLosses
from lifelong_moe.retraining.decision import Action
from lifelong_moe.retraining.drifted import Drift
from lifelong_moe.retraining.predicted import Power
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import timestamp
from lifelong_moe.store.versions import VersionStage
from pipelines.retrain import probes
from pipelines.retrain.plan import exceeded_limits
from pipelines.retrain.plan_file import Decided, PlanFacts, StageFacts, settings_hash

DAY = 86400.0
STAGE = StageFacts(
    name="new", key="ab" * 32, continues=None, grow={"experts": 2}, tokens=1000, probe_tokens=100, active_flops=1e9,
    experts_per_layer=4, parameters_total=10, parameters_trainable=5, replay_fraction=0.0, disk_bytes=500, hours=2.0,
)  # fmt: skip


def test_probes_are_spent_as_the_stage_is() -> None:
    assert (STAGE.tokens_spent(3), STAGE.hours_spent(3)) == (1300, pytest.approx(2.6))
    assert replace(STAGE, hours=None).hours_spent(1) is None


def exceeded(promoted_days_ago: tuple[float, ...] = (), probes: int = 3, **limits: float) -> list[str]:
    stage = VersionStage(name="a", key="k", data="d", action="base")
    head = RunHead(run="r", method="lifelong", seed=0, config={}, plan=("k",), names=("a",), stages=("k",))
    if promoted_days_ago:
        head = head.with_base([stage], timestamp(0))
    for days in promoted_days_ago:
        head = head.promoted("promoted", [stage], "", timestamp(time.time() - days * DAY))
    return exceeded_limits(LimitsConfig(**limits), STAGE, head, probes)  # type: ignore[arg-type]


def test_limits_count_the_stage_and_its_probes_and_are_themselves_allowed() -> None:
    assert exceeded(tokens=1300, hours=2.6001, disk_bytes=500) == exceeded() == []
    assert exceeded(tokens=1299) == ["limits.tokens=1299 would be exceeded: 1300."]
    assert exceeded(tokens=1099, probes=1) == ["limits.tokens=1099 would be exceeded: 1100."]
    assert exceeded(hours=2.5) == ["limits.hours=2.5 would be exceeded: 2.6."]
    assert exceeded(disk_bytes=499) == ["limits.disk_bytes=499 would be exceeded: 500."]


def test_promotions_of_seven_days_count() -> None:
    assert exceeded((7.1, 8.0), promotions_per_week=1) == []
    assert exceeded((6.9, 8.0), promotions_per_week=1) == ["limits.promotions_per_week=1 would be exceeded: 2."]
    assert exceeded((6.9, 1.0), promotions_per_week=3) == []


# A probe's numbers


def losses(nats_per_token: np.ndarray) -> DocumentLosses:
    """A source each, of a hundred tokens."""
    return DocumentLosses(
        100 * nats_per_token, np.full(len(nats_per_token), 100), [str(i) for i in range(len(nats_per_token))]
    )


def probed(
    monkeypatch: pytest.MonkeyPatch, seed: int, sides: dict[tuple[str, str, bool], np.ndarray], gate: GateConfig
) -> Any:
    """A probe whose losses are given by stage, distribution and whether its text is shuffled."""
    config = SimpleNamespace(seed=seed, evaluated=["new", "one", "two"])
    plain = {"planned": SimpleNamespace(parameters=SimpleNamespace(total=130)), "config": config}
    trainer: Any = SimpleNamespace(
        new="new", parent=SimpleNamespace(key="before"), champion=None, store=None, architecture=None,
        retraining=SimpleNamespace(settings=SimpleNamespace(gate=gate)),
        train=lambda *_: SimpleNamespace(key="after"),
        leak=lambda stage, _, name: {"one": 0.1, "two": 0.3, "new": 0.9}[name],
    )  # fmt: skip
    measurements = SimpleNamespace(
        measurable=lambda without=(): [n for n in config.evaluated if n not in without],
        losses=lambda key, name, shuffled=False: losses(sides[key, name, shuffled]),
    )
    short = SimpleNamespace(config=config, measurements=measurements)
    monkeypatch.setattr(probes, "shortened", lambda *_: short)
    monkeypatch.setattr(probes, "kinds_of_text", lambda *_: {})
    monkeypatch.setattr(probes, "count_parameters", lambda _: SimpleNamespace(total=100))
    monkeypatch.setattr(probes, "_cost_fraction", lambda trainer, candidate, number: number / 10)
    return probes.probe(trainer, SimpleNamespace(**plain), 4)  # type: ignore[arg-type]


def test_a_probe_s_bounds_hold_at_five_percent_and_harm_is_shown_at_that_over_the_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 400 equal sources a bound is the normal distribution's; a bootstrap's scatters, and is averaged."""
    halves: dict[str, list[float]] = {"gain": [], "structure": [], "least": [], "most": []}
    for seed in range(12):
        rng = np.random.default_rng(seed)
        gained, ordered, lost = (rng.normal(size=400) for _ in range(3))
        gained, ordered, lost = ((x - x.mean()) / x.std() for x in (gained, ordered, lost))
        sides = {
            ("before", "new", False): 5 + gained, ("after", "new", False): np.full(400, 4.0),
            ("after", "new", True): 6 + ordered,
            **{(stage, name, False): np.zeros(400) for stage in ("before", "after") for name in ("one", "two")},
            ("after", "two", False): 0.5 + lost,
        }  # fmt: skip
        found = probed(monkeypatch, seed, sides, GateConfig(level=0.1))
        error = 1 / math.sqrt(400)
        assert found.gain == pytest.approx(1.0)
        halves["gain"] += [(1 - found.gain_lower) / error, (found.gain_upper - 1) / error]
        halves["structure"] += [(2 - found.structure) / error, (found.structure_upper - 2) / error]
        halves["most"].append((found.forgetting - 0.5) / error)
        halves["least"].append((0.5 - found.forgetting_lower) / error)
        assert (found.leak, found.parameters_fraction, found.cost_fraction) == (0.3, 0.3, 0.4)
    quantiles = {"gain": 0.05, "structure": 0.05, "most": 0.1, "least": 0.1 / 2}  # two groups of old text
    for name, level in quantiles.items():
        assert np.mean(halves[name]) == pytest.approx(-norm.ppf(level), rel=0.03), name


# Plans that were made before


@pytest.fixture
def plan() -> tuple[dict[str, Any], Any]:
    """A plan's facts, and the retraining file that it was made by."""
    retraining: Any = SimpleNamespace(settings=RetrainConfig(base="x"), raw=lambda: {"base": "x"})
    facts = {
        "champion": {"version": 0, "key": "cd" * 32}, "batch": "ef" * 32, "settings": settings_hash(retraining),
        "sources": "ff", "stage": asdict(STAGE), "made_at": timestamp(), "expires": timestamp(time.time() + DAY),
        "decision": {"action": "grow"}, "exceeded": [],
    }  # fmt: skip
    return facts, retraining


def test_settings_are_all_that_a_person_configured(plan: Any) -> None:
    facts, retraining = plan
    other_gate = RetrainConfig(base="x", gate=GateConfig(level=0.1))
    now, others = vars(retraining), ({"settings": other_gate}, {"raw": lambda: {"base": "y"}})
    assert settings_hash(retraining) == facts["settings"]
    # Who lets a candidate serve matters only once it has passed the gate.
    by_hand = RetrainConfig(base="x", promote=PromoteRule.manual)
    assert settings_hash(SimpleNamespace(**{**now, "settings": by_hand})) == facts["settings"]  # type: ignore[arg-type]
    for other in others:
        assert settings_hash(SimpleNamespace(**{**now, **other})) != facts["settings"]  # type: ignore[arg-type]


def test_a_plan_is_read_as_it_was_written(plan: Any) -> None:
    """Bounds that there are none of are null in the file, and what an earlier version's plan lacks is absent."""
    facts = PlanFacts.from_json(plan[0])
    assert (facts.power, facts.looks, facts.near_copies) == (None, None, None)
    decision = Decided(facts.decision.action, {"a": math.inf, "b": 1.0}, ["so"])
    drift = Drift(auc=None, null_quantile=None, psi=0.5, new_sources=1, old_sources=1, drifted=False, words="No answer")
    full = replace(facts, decision=decision, drift={"wiki": drift}, power=Power(0.9, 2, "wiki", 0.95))
    written = json.loads(json.dumps(full.to_json(), allow_nan=False))
    assert written["decision"] == {"action": "grow", "terms": {"a": None, "b": 1.0}, "reasons": ["so"]}
    again = PlanFacts.from_json(written)
    assert again == replace(full, decision=Decided(decision.action, {"a": None, "b": 1.0}, ["so"]))
    assert again.postponed("later").decision == Decided(Action.wait, {"a": None, "b": 1.0}, ["so", "later"])
