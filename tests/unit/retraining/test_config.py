from __future__ import annotations

import math
from typing import Any

import pytest

from lifelong_moe.config.retraining.policy import DecisionConfig, DriftConfig, GateConfig, SliceConfig
from lifelong_moe.errors import ConfigError

BAD: list[tuple[type, dict[str, Any], str]] = [
    (DriftConfig, {"auc": 0.4}, "drift.auc=0.4 must lie in [0.5, 1)."),
    (DriftConfig, {"auc": math.nan}, "drift.auc=nan must lie in [0.5, 1)."),
    (DriftConfig, {"quantile": 1.0}, "drift.quantile=1.0 must lie in [0.5, 1)."),
    (DriftConfig, {"permutations": 198}, "drift.permutations=198 must be at least 199 for drift.quantile=0.99."),
    (DriftConfig, {"documents": 1}, "drift.documents=1 must be at least 2."),
    (DecisionConfig, {"forgetting_weight": -1.0}, "decision.forgetting_weight=-1.0 must not be negative."),
    (DecisionConfig, {"parameter_weight": -1.0}, "decision.parameter_weight=-1.0 must not be negative."),
    (DecisionConfig, {"cost_weight": math.nan}, "decision.cost_weight=nan must not be negative."),
    (DecisionConfig, {"tolerance": -0.1}, "decision.tolerance=-0.1 must not be negative."),
    (DecisionConfig, {"min_structure": -0.1}, "decision.min_structure=-0.1 must not be negative."),
    (DecisionConfig, {"min_gain": 0.0}, "decision.min_gain=0.0 must be positive."),
    (GateConfig, {"min_gain": -0.1}, "gate.min_gain=-0.1 must not be negative."),
    (GateConfig, {"tolerance": -0.1}, "gate.tolerance=-0.1 must not be negative."),
    (GateConfig, {"level": 0.5}, "gate.level=0.5 must lie between 0 and 0.5."),
    (GateConfig, {"resamples": 399}, "gate.resamples=399 must be at least 400 for gate.level=0.05."),
    (GateConfig, {"level": 0.001}, "gate.resamples=2000 must be at least 20000 for gate.level=0.001."),
    (GateConfig, {"max_leak": 1.5}, "gate.max_leak=1.5 must lie in [0, 1]."),
    (
        GateConfig,
        {"slices": {"a": SliceConfig(sources="x", tolerance=-0.1)}},
        "gate.slices.a.tolerance=-0.1 must not be negative.",
    ),
    (
        GateConfig,
        {"slices": {"a": SliceConfig(sources="")}},
        "gate.slices.a.sources must be a pattern, such as 'cs-*'.",
    ),
]


@pytest.mark.parametrize(("section", "values", "message"), BAD)
def test_a_bad_value_costs_one_line(section: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**values)
    assert str(caught.value) == message


def test_the_fewest_permutations_that_can_reach_a_quantile() -> None:
    assert DriftConfig(quantile=0.99, permutations=199).permutations == 199
    assert DriftConfig(quantile=0.95, permutations=39).permutations == 39
