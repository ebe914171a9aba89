"""`lifelong-moe promote`: a person lets a candidate serve that has passed the gate, or refuses to.

The head decides; ledger, MLflow and hooks follow, as after a tick that promotes by itself. Repeating the command after
a kill completes what is missing.
"""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from lifelong_moe.config.retraining.operation import HooksConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.storage.locks import locked
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import RunRecord, require_head, timestamp
from lifelong_moe.store.stages import StageStore
from lifelong_moe.store.versions import Version, describe
from pipelines.retrain import hooks
from pipelines.retrain.outcome import AWAITING, ServingVersion, TickOutcome
from pipelines.shared.markdown import plain
from pipelines.shared.places import ROOT
from pipelines.shared.recorded import follow_champion, model_name, tracker_of


def promote(
    run: str, version: int | None, console: Console, *, reject: bool = False, told: HooksConfig | None = None
) -> dict[str, str | int]:
    """Make the version that awaits approval the champion, or refuse to.

    Args:
        run: A run whose retraining has ``promote: manual``.
        version: The version that is meant; by default the one that awaits approval.
        console: Output for people.
        reject: Refuse it.
        told: Hooks of the retraining file; None tells nobody.

    Raises:
        ConfigError: If there is no such run or version, or none that can be approved.
        LockedError: If another process works on the run.
        CorruptError: If a stage that is to serve is no longer in the store.
    """
    # A run that does not exist is refused before a lock file is made for it.
    require_head(ROOT, run)
    record, store = RunRecord(ROOT, run), StageStore(ROOT)
    with locked(record.lock_path, f"run {run}"):
        head = require_head(ROOT, run)
        at, outcome = timestamp(), "rejected" if reject else "promoted"
        if (known := _decided(head, version, reject=reject)) is not None:
            said, now = "rejected already" if reject else "champion already", head.champion
            console.print(f"{run}: version {known.id} is {said}; serves: {describe(now)}")
            # A kill may have come before MLflow heard of it.
            _record(head, known, outcome, console)
            follow_champion(head, console)
            return {"run": run, "outcome": said, "version": known.id, "champion": now.id, "key": known.key}
        waits = _meant(head, version, reject=reject)
        if not reject:
            store.get(waits.key)  # for its errors: a champion whose files are damaged serves nobody
            store.sign(waits.key, head.centroids)
        after = _settled(head.refused() if reject else head.approved(at), waits, outcome, at)
        now = after.champion
        # Ledger before head: a kill in between leaves a line too many and never a change without a line.
        record.log("promote", outcome=outcome, version=waits.id, key=waits.key, champion=now.id)
        record.set_head(after)
        console.print(f"{run}: version {waits.id} is {outcome}; serves: {describe(now)}")
        _record(after, waits, outcome, console)
        follow_champion(after, console)
    if told is not None:
        hooks.tell(told, _outcome(after, waits, outcome, at))
    return {"run": run, "outcome": outcome, "version": waits.id, "champion": now.id, "key": waits.key}


def _decided(head: RunHead, version: int | None, *, reject: bool) -> Version | None:
    """The version that is meant if it serves, or is rejected, already: named, or the last one and none awaits."""
    if not head.versions or (version is None and head.candidate is not None):
        return None
    if not reject:
        now = head.champion
        return now if version == now.id or (version is None and now.kind == "promoted") else None
    last = head.versions[-1].id if version is None else version
    if not 0 <= last < len(head.versions) or head.versions[last].approval != "refused":
        return None
    # A batch that was looked at again has another verdict, which MLflow shows under the same run.
    batch = head.batches.get(head.versions[last].stages[-1].batch or "")
    return head.versions[last] if batch is not None and batch.outcome == "rejected" else None


def _meant(head: RunHead, version: int | None, *, reject: bool) -> Version:
    """The version to decide about.

    Raises:
        ConfigError: If it cannot be approved.
    """
    if version is not None and (head.candidate is None or head.candidate.id != version):
        if not 0 <= version < len(head.versions):
            there = f"there are 0 to {len(head.versions) - 1}" if head.versions else "there is none yet"
            raise ConfigError(f"run {head.run} has no version {version}; {there}.")
        if head.versions[version].approval == "refused":
            raise ConfigError(
                f"version {version} of run {head.run} was rejected; retrain --reopen BATCH looks at its text again."
            )
        back = f"lifelong-moe rollback {head.run}"
        hint = f"{back} --to {version} lets it serve again"
        if version == head.champion_id:
            hint = f"{back} lets the version before it serve"
        raise ConfigError(f"version {version} of run {head.run} awaits no approval: it has served. {hint}.")
    # Who refuses it need not wait until it is measured against today's champion.
    return head.candidate if reject and head.candidate is not None else head.require_candidate()


def _settled(head: RunHead, waits: Version, outcome: str, at: str) -> RunHead:
    """The head with what became of the version's batch, and of the tick that left it to a person."""
    batch, reason = waits.stages[-1].batch, f"{outcome} by a person: {waits.reason}"
    if (last := head.last_tick) is not None and last.outcome == AWAITING:
        # As after a tick that promotes, the next one tells MLflow which version serves, should this command be killed.
        head = replace(head, last_tick=replace(last, outcome=outcome, reason=reason))
    if batch is None or batch not in head.batches:
        return head
    known = replace(head.batches[batch], outcome=outcome, reason=reason, at=at)
    return replace(head, batches={**head.batches, batch: known})


def _record(head: RunHead, version: Version, outcome: str, console: Console) -> None:
    """Tell MLflow's run of the tick, and the registered version, what became of the candidate."""
    last = version.stages[-1]
    run_id = head.mlflow.ticks.get(last.batch or "")
    if run_id is None:
        return
    tracker = tracker_of(head)
    if not tracker.active:
        return
    model, tags = model_name(head), {"stage_key": version.key, "stage": last.name, "run": head.run, "data": last.data}
    tracker.start_run("", run_id=run_id, tags={"lifelong.outcome": outcome})
    said = f"{outcome} by a person: {plain(version.reason)}."
    tracker.register_version(model, run_id=run_id, tags=tags, description=said)
    if outcome == "rejected":
        tracker.remove_alias(model, run_id=run_id, stage_key=version.key, alias="candidate")
    tracker.finish(run_id)
    if tracker.problem:
        console.print(tracker.problem)


def _outcome(head: RunHead, waits: Version, outcome: str, at: str) -> TickOutcome:
    """What the hooks are told, in the form of a tick's outcome."""
    now, last = head.champion, waits.stages[-1]
    return TickOutcome(
        outcome,
        f"{outcome} by a person: {waits.reason}",
        champion=ServingVersion(now.id, now.stages[-1].name, now.key),
        batch=last.batch,
        data=last.data,
        action=last.action,
        candidate=waits.key,
        version=waits.id,
        run=head.run,
        at=at,
    )
