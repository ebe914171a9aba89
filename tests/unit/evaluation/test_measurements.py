"""Stored measurements are found again: their keys are on disk."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.routing.topk import LearnedConfig
from lifelong_moe.evaluation.measurements import Measurements, StoredLosses, What, read_evaluation
from lifelong_moe.plan.architecture import Architecture, first_generation
from lifelong_moe.storage.plain import PlainError


@pytest.mark.parametrize(
    ("what", "by_label", "key"),
    [
        ("distribution", False, "be21e74a6b9c60ce"),
        ("documents", False, "c502d5dad2908836"),
        ("shuffled documents", False, "f209d2b8d8180af4"),
        ("distribution", True, "4d82a045ea7d0dac"),
        ("documents", True, "5437b71d21e20ef0"),
        ("shuffled documents", True, "d0dfe5cef4a438df"),
    ],
)
def test_what_earlier_versions_measured_is_found_again(what: What, by_label: bool, key: str) -> None:
    """These keys were computed by a version that described each kind of measurement by itself."""
    evaluate, routing = SimpleNamespace(tokens=3000, batch_tokens=1), SimpleNamespace(by_label=by_label)
    config: Any = SimpleNamespace(evaluate=evaluate, model=SimpleNamespace(context=64), routing=routing)
    records = {"wiki": SimpleNamespace(heldout_hash="ab" * 32)}
    data: Any = SimpleNamespace(records=records, tokenizer=SimpleNamespace(hash="cd" * 32))
    nothing: Any = None
    assert Measurements(config, data, nothing, nothing, nothing, nothing).key("wiki", what).startswith(key)


MODEL = ModelConfig(layers=2, experts=2, moe_every=2, dense_layers=0)
ARCHITECTURE = Architecture(MODEL, LearnedConfig(), 10, 0, (first_generation("wiki", MODEL),))
EVALUATION: dict[str, Any] = {
    "nats_per_token": 1.0,
    "bits_per_byte": 1.0,
    "tokens": 3,
    "bytes": 4,
    "documents": 1,
    "expert_counts": [[], [3, 0]],
}
LOSSES: dict[str, Any] = {"nats": [1.0, 0.0], "tokens": [3, 0], "document": [0, 1], "expert_counts": [[], [3, 0]]}


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: number} for name in ("tokens", "bytes", "documents") for number in (0, -1)),
        *({"expert_counts": counts} for counts in ([], [[], [3]], [[0], [3, 0]], [[], [4, -1]], [[], [0, 0]])),
    ],
    ids=str,
)
def test_a_stored_evaluation_that_no_model_has_is_not_believed(wrong: dict[str, Any]) -> None:
    assert read_evaluation(EVALUATION, ARCHITECTURE).tokens == 3
    with pytest.raises(PlainError, match=next(iter(wrong))):
        read_evaluation(EVALUATION | wrong, ARCHITECTURE)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"tokens": tokens} for tokens in ([3], [3, -1], [0, 0])),
        {"document": [0, 2]},
        {"expert_counts": [[], [3]]},
        {"nats": [], "tokens": [], "document": []},
    ],
    ids=str,
)
def test_stored_losses_that_no_model_has_are_not_believed(wrong: dict[str, Any]) -> None:
    assert StoredLosses.read(LOSSES, ARCHITECTURE, 2).tokens == [3, 0]
    with pytest.raises(PlainError):
        StoredLosses.read(LOSSES | wrong, ARCHITECTURE, 2)
