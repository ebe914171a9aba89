"""A comparison's numbers in MLflow: on each arm's run with a seed, on a run an arm over seeds, and on its own run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lifelong_moe.measures import MEASURES, Measure
from lifelong_moe.reports.seeds import FEW
from lifelong_moe.reports.verdict import comparison_verdict
from lifelong_moe.storage.keys import text_sha256
from lifelong_moe.store.runs import RunRecord
from lifelong_moe.tracking.operations import LOCAL_PREFIX
from lifelong_moe.tracking.tracker import Tracker
from pipelines.compare.head import ComparisonMlflow, Logged
from pipelines.run.compared import Compared
from pipelines.shared.markdown import plain
from pipelines.shared.workspace import ROOT

MEANS = "comparison_means"
"""Tag of the runs that hold an arm's means over seeds: the comparison's name."""
Places = Mapping[str, Compared]
"""By name of a run."""
HEADLINE, HEADLINE_METRIC = "final_mean_bits_per_byte", "heldout_mean_bits_per_byte"
"""The number of each arm that the comparison's own run shows, and its name there."""
REFERENCES = {"plasticity_gap": "unrestrained", "oracle_gap": "joint"}
"""For numbers that compare with an arm, by the beginning of their names, the role of that arm."""


def log_runs(tracker: Tracker, found: Mapping[str, Any], places: Places, told: ComparisonMlflow) -> None:
    """Log the numbers of each committed run on it, and its place in the comparison, which it may have had before.

    Args:
        tracker: Connection to MLflow, if there is any.
        found: The comparison.
        places: Of the runs.
        told: What MLflow was told; changed.
    """
    for run in _committed(found):
        place, head = places[run["run"]], RunRecord(ROOT, run["run"]).head()
        run_id = head.mlflow.run if head else None
        numbers = dict(_beside_others(run["numbers"], found, place))
        logged = told.logged.get(run["run"], {})
        # A run that was started over has another id and none of the numbers yet.
        old = logged if logged.get("id") == run_id else {}
        # Runs of earlier versions have no place.
        known = {"id": run_id or "", "arm": place.arm, **numbers}
        if run_id is None or known.items() <= old.items() or not tracker.run_exists(run_id):
            continue
        tracker.start_run(
            place.name, run_id=run_id, parent_id=place.parent, params=place.settings, tags=place.tags, adds=True
        )
        _log_changed(tracker, run_id, numbers, old)
        tracker.finish(run_id)
        told.logged[run["run"]] = known


def log_means(tracker: Tracker, found: Mapping[str, Any], places: Places, told: ComparisonMlflow) -> None:
    """Log each arm's means over seeds, their intervals, and its differences from the reference, on a run of its own.

    Args:
        tracker: Connection to MLflow, if there is any.
        found: The comparison.
        places: Of the runs.
        told: What MLflow was told; changed.
    """
    verdicts = comparison_verdict(found)
    for arm in found["arms"]:
        if sum(run["status"] == "committed" for run in arm["runs"]) < 2:
            continue  # of one seed the run itself shows all
        place, old = places[arm["runs"][0]["run"]], told.arms.get(arm["name"], {})
        numbers = {
            **dict(_spread(arm["summary"], found, place)),
            **dict(_differences(arm["differences"] or {})),
        }
        if numbers.items() <= old.items() and tracker.run_exists(str(old.get("id", ""))):
            continue
        # Derived, so that a process that is killed before the head is written finds the run again.
        known = old.get("id") or LOCAL_PREFIX + text_sha256(f"{place.parent} {place.arm}")[:32]
        params = place.settings | {"seed": "all", "seeds": found["seeds"], "overrides": arm["overrides"]}
        tags = {"lifelong.kind": "arm", "lifelong.comparison": place.comparison, MEANS: place.comparison}
        run_id = tracker.start_run(
            f"{place.arm} · mean over seeds · {place.comparison}",
            run_id=str(known),
            parent_id=place.parent,
            params=params,
            tags=tags | place.settings | {"seed": "all"},
            note="\n\n".join(map(plain, verdicts[arm["name"]])),
            adds=True,
        )
        _log_changed(tracker, run_id, numbers, old if run_id == known else {})
        tracker.finish(run_id)
        told.arms[arm["name"]] = {"id": str(run_id), **numbers}


def log_progress(tracker: Tracker, parent: str | None, found: Mapping[str, Any], told: ComparisonMlflow) -> None:
    """Log on the comparison's own run how many runs there are, and one number of each arm.

    Args:
        tracker: Connection to MLflow, if there is any.
        parent: The comparison's own run.
        found: The comparison.
        told: What MLflow was told; changed.
    """
    runs = [run for arm in found["arms"] for run in arm["runs"]]
    numbers: dict[str, float] = dict.fromkeys(("runs/committed", "runs/failed", "runs/absent"), 0.0)
    for run in runs:
        numbers[f"runs/{run['status']}"] += 1.0
    for arm in found["arms"]:
        if (mean := arm["summary"].get(HEADLINE)) is not None:
            numbers[f"{HEADLINE_METRIC}/{arm['name']}"] = float(mean["mean"])
    _log_changed(tracker, parent, numbers, told.own if told.own.get("id") == parent else {})
    told.own = {"id": parent or "", **numbers}


def _committed(found: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (run for arm in found["arms"] for run in arm["runs"] if run["status"] == "committed")


def is_by_definition(number: str, found: Mapping[str, Any], arm: str) -> bool:
    """Whether a number is 0 by definition, since the arm is itself what it compares with."""
    return any(number.startswith(key) and found[role] == arm for key, role in REFERENCES.items())


def _beside_others(numbers: Mapping[str, float | None], found: Mapping[str, Any], place: Compared) -> Logged:
    """What a run cannot know by itself; its own page has all else."""
    return {
        MEASURES[key].metric: MEASURES[key].scale * value
        for key, value in numbers.items()
        # Without models from scratch, their cost is 0.
        if value and key.startswith((*REFERENCES, "scratch")) and not is_by_definition(key, found, place.arm)
    }


def _spread(
    summary: Mapping[str, Mapping[str, Any] | None], found: Mapping[str, Any], place: Compared
) -> Iterator[tuple[str, float]]:
    """Means over seeds under the names that the runs' own pages have, and the ends of their intervals."""
    for key, spread in summary.items():
        if key not in MEASURES or spread is None or is_by_definition(key, found, place.arm):
            continue
        if key.startswith("scratch") and not spread["mean"]:
            continue
        measure = MEASURES[key]
        yield measure.metric, measure.scale * spread["mean"]
        yield from _ends("interval", measure, spread)


def _differences(differences: Mapping[str, Mapping[str, Any] | None]) -> Iterator[tuple[str, float]]:
    """Mean differences from the reference, the ends of their intervals, and p, in sections of their own."""
    for key, spread in differences.items():
        if key not in MEASURES or spread is None:
            continue
        measure, name = MEASURES[key], _last(MEASURES[key])
        yield f"difference/{name}", measure.scale * spread["mean"]
        yield from _ends("difference_interval", measure, spread)
        if spread["n"] > FEW and spread["p"] is not None:
            yield f"difference_interval/{name}_p", spread["p"]


def _ends(section: str, measure: Measure, spread: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The two ends: of the interval, or of the range where an interval over so few seeds would say nothing."""
    names = ("lowest", "highest") if spread["n"] <= FEW else ("low", "high")
    for name in names:
        yield f"{section}/{_last(measure)}_{name}", measure.scale * spread[name]


def _last(measure: Measure) -> str:
    return measure.metric.rpartition("/")[2]


def _log_changed(tracker: Tracker, run_id: str | None, numbers: Logged, old: Logged) -> None:
    """Log the numbers that MLflow does not have yet."""
    tracker.log_metrics(run_id, [(key, float(value), 0) for key, value in numbers.items() if old.get(key) != value])
