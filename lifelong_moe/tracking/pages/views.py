"""Saved views of MLflow's list of runs: which columns and charts it opens with, in which order.

Opened as it is, the list has no column that tells which run is good, and a chart for each of all metrics. MLflow
keeps a saved view as a tag of the experiment, in JSON, and lists it in the menu at the top of the list.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lifelong_moe.measures import MEASURES
from lifelong_moe.storage.keys import text_sha256

TAG = "mlflow.sharedViewState."
"""Begins the key of the experiment's tag; the key of the view follows, by which an address names it."""
FILTERS = ("comparison", "comparison_means")
"""Tags of runs by which a view may choose: a comparison's runs, and the means of its arms over seeds."""
COLUMNS = ("final_mean_bits_per_byte", "forgetting_max", "plasticity_gap", "tokens", "active_flops", "seconds")
BARS = ("final_mean_bits_per_byte", "forgetting_max", "plasticity_gap", "active_flops")
LINES = ("heldout_over_tokens",)
SECTION = "Quality and cost"
SAVED = 1_700_000_000_000
"""Milliseconds since 1970. Constant, so that the same view is the same tag."""


@dataclass(frozen=True)
class View:
    """A saved view; lists the best run first."""

    key: str
    """Part of addresses."""
    title: str
    """In MLflow's menu."""
    search: str = ""
    """Filter in MLflow's syntax; empty for all runs."""

    @property
    def tags(self) -> dict[str, str]:
        """The experiment's tag that is this view."""
        saved = {"name": self.title, "createdAt": SAVED, "updatedAt": SAVED, "state": json.dumps(self._state())}
        return {TAG + self.key: json.dumps(saved)}

    def _state(self) -> Mapping[str, Any]:
        best, metrics = _column("metrics", COLUMNS[0]), [_column("metrics", name) for name in COLUMNS]
        columns = [*metrics, "params.`method`", "params.`routing.mode`", "params.`seed`"]
        section = {"uuid": "lifelong", "name": SECTION, "display": True, "isReordered": True}
        return {
            "searchFilter": self.search,
            "orderByKey": best,
            "orderByAsc": True,
            "selectedColumns": columns,
            "columnOrder": columns,
            "compareRunCharts": [*map(_bars, BARS), *map(_line, LINES)],
            "compareRunSections": [section | {"deleted": False, "isGenerated": False}],
            # Else MLflow sorts the sections by name, and ours is not the first.
            "isAccordionReordered": True,
            "hideEmptyCharts": True,
            # By default charts show the first ten rows alone.
            "runsHiddenMode": "SHOW_ALL",
        }


RUNS = View("lifelong-runs", "Best held-out loss first")
"""Of all runs of an experiment."""


def comparison_view(tag: str, name: str) -> View:
    """The view of a comparison's runs.

    Args:
        tag: One of :data:`FILTERS`.
        name: Of the comparison.
    """
    # The menu lists views by title.
    title = f"Comparison {name}" + (", means over seeds" if tag == FILTERS[1] else "")
    return View(f"lifelong-{text_sha256(f'{tag} {name}')[:16]}", title, f"tags.{tag}='{name}'")


def _column(kind: str, measure: str) -> str:
    return f"{kind}.`{MEASURES[measure].metric}`"


def _bars(measure: str) -> Mapping[str, Any]:
    """A chart of the last values, a bar a run."""
    metric = MEASURES[measure].metric
    chart = {"uuid": f"lifelong-{measure}", "metricSectionId": "lifelong", "deleted": False, "isGenerated": False}
    return chart | {"type": "BAR", "metricKey": metric, "displayName": metric, "runsCountToCompare": 100}


def _line(measure: str) -> Mapping[str, Any]:
    """A chart of all values over their step, a line a run."""
    metric = MEASURES[measure].metric
    axes = {"xAxisKey": "step", "xAxisScaleType": "linear", "selectedXAxisMetricKey": "", "scaleType": "linear"}
    shown = {"yAxisKey": "metric", "yAxisExpressions": [], "range": {}, "lineSmoothness": 0, "displayPoints": True}
    # MLflow's own settings for all charts would smooth them and draw them over time.
    own = {"useGlobalLineSmoothing": False, "useGlobalXaxisKey": False, "ignoreOutliers": False}
    return {**_bars(measure), "type": "LINE", "selectedMetricKeys": [metric], **axes, **shown, **own}
