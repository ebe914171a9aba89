"""Stored measurements are found again: their keys are on disk."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lifelong_moe.evaluation.measurements import Measurements, What


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
    assert Measurements(config, data, nothing, nothing).key("wiki", what).startswith(key)
