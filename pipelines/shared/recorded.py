"""Where a run is recorded in MLflow, and its alias `champion` there.

The run's head decides which version serves; the alias only shows it. Commands that change the head update the alias,
at once or through the spool; ticks, runs and ``sync`` correct an alias that is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from lifelong_moe.config.tracking import TrackingConfig
from lifelong_moe.errors import CorruptError, LifelongError, LockedError, one_line
from lifelong_moe.redaction import shown_address
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.storage.locks import locked
from lifelong_moe.storage.verified import read_manifest
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import RunRecord, require_head
from lifelong_moe.store.stages import WEIGHTS
from lifelong_moe.tracking.operations import MODEL_PREFIX
from lifelong_moe.tracking.tracker import Tracker
from pipelines.shared.places import ROOT


def tracking_of(head: RunHead) -> TrackingConfig:
    """How a command that is given no configuration tracks a run: as the run's own says, but never where it says.

    A store may come from somebody else, who must not choose where this user's records and password go.
    """
    stored = head.config.get("tracking")
    stored = stored if isinstance(stored, Mapping) else {}
    enabled, experiment = stored.get("enabled"), stored.get("experiment")
    # References are not resolved: what they meant is unknown.
    is_name = isinstance(experiment, str) and experiment and "${" not in experiment
    return TrackingConfig(
        enabled=enabled is not False, experiment=str(experiment) if is_name else TrackingConfig().experiment
    )


def tracked_elsewhere(head: RunHead) -> str | None:
    """Why a command that is given no configuration does not track a run; None if it does."""
    stored = head.config.get("tracking")
    uri = stored.get("uri") if isinstance(stored, Mapping) else None
    if not isinstance(uri, str) or "MLFLOW_TRACKING_URI" in os.environ:
        return None
    scheme, _, path = uri.partition(":///")
    if scheme == "sqlite" and Path(path).absolute() == (ROOT / "mlflow.db").absolute():
        return None
    return f"it is tracked at {one_line(shown_address(uri))}; set MLFLOW_TRACKING_URI, and this is recorded too."


def tracker_of(head: RunHead) -> Tracker:
    """Connect to where the user tracks now: ``MLFLOW_TRACKING_URI``, or the database of this store.

    Returns:
        The tracker; an inactive one if the run was tracked elsewhere, whose ``problem`` then says so.
    """
    config, elsewhere = tracking_of(head), tracked_elsewhere(head)
    if config.enabled and elsewhere is not None:
        return Tracker(config.experiment, "", None, f"nothing of run {head.run} is recorded in MLflow: {elsewhere}")
    return Tracker.connect(config, ROOT)


def model_name(head: RunHead) -> str:
    """Name of a run's model in MLflow's registry."""
    return f"{MODEL_PREFIX}{head.run}"


def show_champion(head: RunHead, tracker: Tracker, *, registers: bool = True) -> str | None:
    """Set the alias to the serving stage, which is registered first if MLflow does not know it.

    Args:
        head: The run's head.
        tracker: Connection to MLflow; without one, the spool keeps the request.
        registers: Whether a run without any version gets one; arms of a comparison have none unless somebody asks.

    Returns:
        Why the alias is not set, or not yet; None if it is, or if there is nothing to set: MLflow has no record of the
        run, or stages are still to do.
    """
    known = _runs(head)
    if not known or not tracker.active or not head.is_finished:
        return None
    key, model = head.plan[-1], model_name(head)
    run_id = next((run for run in known if tracker.run_exists(run)), None)
    manifest = next((ROOT / "stages").glob(f"*-{key[:SHORT]}/manifest.json"), None)
    if run_id is not None and manifest is not None and tracker.version_with_alias(model, key, "champion") is not None:
        return None
    if run_id is None or manifest is None:
        missing = "MLflow has no record of the run" if run_id is None else f"stage {key[:SHORT]} is not in the store"
        return f"MLflow's alias champion of {model} is unchanged: {missing}."
    if not registers and not tracker.has_model(model):
        return None
    weights = read_manifest(manifest.parent).files.get(WEIGHTS)
    if weights is None:
        raise CorruptError(f"{manifest}: lists no {WEIGHTS}.")
    tags = {"stage_key": key, "stage": head.names[-1], "run": head.run, "weights_sha256": weights.sha256}
    number = tracker.register_version(model, run_id=run_id, tags=tags, alias="champion")
    return tracker.problem if number is None else None


def _runs(head: RunHead) -> list[str]:
    """MLflow runs that may have trained the serving stage, the likeliest first."""
    told, batch = head.mlflow, head.champion.stages[-1].batch if head.versions else None
    # The stage's own run, the tick that promoted it, the parent run, then any tick.
    ids = [told.stages.get(head.plan[-1]), told.ticks.get(batch or ""), told.run, *told.ticks.values()]
    return [run for run in dict.fromkeys(ids) if run]


def follow_champion(head: RunHead, console: Console) -> None:
    """Update the alias after a promotion and print the result; a failure there does not undo the promotion."""
    if not _runs(head):
        return
    try:
        tracker = tracker_of(head)
        if not tracker.active and not tracking_of(head).enabled:
            return
        line = tracker.problem if not tracker.active else show_champion(head, tracker)
        line = line or "MLflow's alias champion is updated."
    except LifelongError as error:
        line = f"MLflow's alias champion is unchanged: {error}"
    console.print(line, soft_wrap=True)


def follow_champions() -> dict[str, str]:
    """Correct the alias of every run whose MLflow answers and has a model of it.

    Returns:
        For each run whose alias may still be wrong, the reason.
    """
    trackers: dict[tuple[str, str | None], Tracker] = {}
    problems: dict[str, str | None] = {}
    for path in sorted((ROOT / "runs").glob("*/head.json")):
        record = RunRecord(ROOT, path.parent.name)
        try:
            with locked(record.lock_path, f"run {record.run}"):
                head = require_head(ROOT, record.run)
                config = tracking_of(head)
                if config.enabled and _runs(head):
                    # Connecting waits for a server that is down; once per experiment is enough.
                    where = (config.experiment, tracked_elsewhere(head))
                    if where not in trackers:
                        trackers[where] = tracker_of(head)
                    tracker = trackers[where]
                    connected, problem = tracker.connected, tracker.problem
                    problems[record.run] = show_champion(head, tracker, registers=False) if connected else problem
        # The process that works on the run updates the alias itself.
        except LockedError:
            continue
        except LifelongError as error:
            problems[record.run] = str(error)
    return {run: problem for run, problem in problems.items() if problem}
