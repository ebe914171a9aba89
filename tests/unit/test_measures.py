"""One name and one unit for each measure."""

from __future__ import annotations

import pytest

from lifelong_moe.measures import MEASURES
from lifelong_moe.tracking.values import clean_key

UNITS = {
    "bits/byte": "bits_per_byte", "nats/token": "nats_per_token", "%": "percent", "nats": "nats", "FLOPs": "flops",
    "tokens": "tokens", "s": "seconds", "J": "joules", "J/token": "joules_per_token", "tokens/s": "tokens_per_second",
    "TFLOP/s": "tflops_per_second", "MB": "megabytes",
}  # fmt: skip
"""How MLflow's names write each unit."""


def test_names_are_mlflows_and_end_with_the_unit() -> None:
    names = [measure.metric for measure in MEASURES.values()]
    sections = [name.partition("/")[0] for name in names]
    assert len(set(names)) == len(names) and sections == sorted(sections)
    for measure in MEASURES.values():
        assert clean_key(measure.metric) == measure.metric
        what = measure.metric.partition("/NAME")[0]
        assert not measure.unit or what.endswith(UNITS[measure.unit]), measure.metric


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("forgetting_bits_per_byte", 0.7104, "+0.710"),
        ("forgetting_bits_per_byte", -0.0004, "0.000"),  # neither + nor - before what is shown as 0
        ("forgetting_max", 0.476, "+47.6"),
        ("leak", 0.842, "84.2"),
        ("bits_per_byte", 2.5, "2.500"),
    ],
)
def test_how_values_are_shown(key: str, value: float, shown: str) -> None:
    assert MEASURES[key].show(value) == shown


def test_titles_and_names_of_a_distribution() -> None:
    assert MEASURES["forgetting_max_bits_per_byte"].title == "forgetting, worst (bits/byte)"
    assert MEASURES["unused_experts"].title == "unused experts"
    assert MEASURES["bits_per_byte"].of("english_docs") == "heldout_bits_per_byte/english_docs"
