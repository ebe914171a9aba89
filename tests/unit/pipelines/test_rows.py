"""Which points of a run MLflow gets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from lifelong_moe.reports.report import Report
from pipelines.run.rows import _routing_rows


def shares(before: dict[str, float], **found: float) -> dict[str, float]:
    use = SimpleNamespace(readers=2.0, shares=found)
    report: Any = SimpleNamespace(routing={}, leaks=dict, mixture={"sea": use})
    rows = _routing_rows(cast(Report, report), 3, before)
    return {key.removeprefix("mixture_percent/sea/"): value for key, value, step in rows if "percent" in key}


def test_a_generation_without_weight_gets_no_point_but_one_after_it_had_some() -> None:
    assert shares({}, a=0.5, b=0.01, c=0.0099) == {"a": 50.0, "b": 1.0}
    had = {"mixture_percent/sea/b": 1.0, "mixture_percent/sea/c": 0.9, "mixture_percent/code/a": 9.0}
    assert shares(had, a=0.001, b=0.001, c=0.001) == {"b": 0.1}
