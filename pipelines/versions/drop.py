"""`lifelong-moe drop`: promote a version without one stage.

Without the newest stage, the model is exactly the one before it. Of an older stage the experts are removed, and the
command reports what else the model retains of its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from lifelong_moe.config.retraining.policy import GateConfig
from lifelong_moe.errors import ConfigError, LifelongError, TryAgainError
from lifelong_moe.evaluation.measurements import Measurements
from lifelong_moe.plan.retraining import read_gate
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.storage.locks import locked
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import RunRecord, require_head, timestamp
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.store.versions import Version, VersionStage, describe
from lifelong_moe.training.derived import derived_stage, what_remains
from pipelines.shared.places import ROOT
from pipelines.shared.recorded import follow_champion
from pipelines.versions.gate_derived import gate_derived, served_measurements
from pipelines.versions.render import print_verdict
from pipelines.versions.served import with_versions


@dataclass(frozen=True)
class DropCandidate:
    """A champion without one of its stages, committed but not serving: the gate may still reject it."""

    stage: CommittedStage
    """Its last stage."""
    chain: tuple[VersionStage, ...]
    """All its stages."""
    remains: list[str]
    """What the model retains of the dropped stage's text, in words; empty if nothing."""


def drop_candidate(store: StageStore, version: Version, name: str) -> DropCandidate:
    """Make the model of a version without one of its stages.

    Args:
        store: Committed stages; the candidate is committed there if it has to be derived.
        version: Usually the champion.
        name: The stage to drop.

    Raises:
        ConfigError: If it is not in the version, is the first, or its experts cannot be removed.
    """
    stages = version.stages
    names = [stage.name for stage in stages]
    if name not in names:
        raise ConfigError(f"version {version.id} has no stage {name}; there are {', '.join(names)}.")
    at = names.index(name)
    if at == 0:
        raise ConfigError(f"stage {name} is the first: all later stages continue it, so it cannot be dropped.")
    if stages[at].action in ("drop", "consolidate"):
        raise ConfigError(f"stage {name} trained nothing that could go; lifelong-moe rollback undoes it.")
    # Nothing builds on the newest stage: the one before it is the exact model without it.
    if at == len(stages) - 1:
        return DropCandidate(store.get(stages[at - 1].key), stages[:-1], [])
    chain = [store.get(stage.key) for stage in stages]
    remains = what_remains(chain, name)
    made = derived_stage(store, chain[-1], name)
    added = VersionStage(name=made.name, key=made.key, data=stages[at].data, action="drop")
    return DropCandidate(made, (*stages, added), remains)


def drop(
    run: str, stage: str, console: Console, overrides: Sequence[str] = (), *, ungated: bool = False
) -> dict[str, Any]:
    """Promote a version without a stage if no other distribution gets worse.

    Args:
        run: Its name.
        stage: Name of the stage.
        console: Output for people.
        overrides: ``gate.KEY=VALUE``.
        ungated: Promote it without asking the gate.

    Raises:
        ConfigError: If there is no such run or stage, or the stage cannot be dropped; nothing is written then.
        LockedError: If another process works on the run.
    """
    settings = read_gate(overrides)
    # A run that does not exist is refused before a lock file is made for it.
    require_head(ROOT, run)
    record, store = RunRecord(ROOT, run), StageStore(ROOT)
    with locked(record.lock_path, f"run {run}"):
        head = with_versions(store, require_head(ROOT, run))
        before = head.champion
        # Before the candidate is committed: if the gate cannot read its text, nothing is written.
        served = None if ungated else _served(head, before, store, stage, settings)
        candidate = drop_candidate(store, before, stage)
        verdict = None
        # If nothing remains, the model is exactly as if the stage had never been added: no gate.
        if candidate.remains and served is not None:
            own = before.own_text(stage)
            verdict = gate_derived(store, before, candidate.stage, served, own, settings, console)
            print_verdict(console, verdict)
        # Without a gate it is promoted: nothing remains of the stage, or the operator said --no-gate.
        passed = verdict is None or verdict.passed
        if passed:
            store.sign(candidate.stage.key, head.centroids)
            head = head.promoted("dropped", candidate.chain, f"without stage {stage}", timestamp())
        now = head.champion
        facts = {"stage": stage, "key": candidate.stage.key, "remains": candidate.remains, "gated": verdict is not None}
        # Ledger before head: a kill in between leaves a line too many and never a change without a line.
        record.log("drop", outcome="promoted" if passed else "rejected", champion=now.id, **facts)
        record.set_head(head)
        console.print(f"{run}: serves: {describe(now)}")
        follow_champion(head, console)
    for sentence in _verdict(stage, candidate):
        console.print(sentence)
    result = {"run": run, "champion": now.id, "kind": now.kind, "outcome": "promoted" if passed else "rejected"}
    if verdict is not None and not passed:
        console.print(f"rejected: {verdict.reasons[0]} --no-gate lets it serve nevertheless.")
    elif verdict is None and candidate.remains:
        console.print("not gated: whether the model got worse was not measured; lifelong-moe rollback undoes this.")
    return {**result, "derived": candidate.stage.derived is not None, **facts}


def _served(head: RunHead, version: Version, store: StageStore, stage: str, gate: GateConfig) -> Measurements | None:
    """Measurements for the gate; None if none is needed.

    Raises:
        ConfigError: If the run's text cannot be read.
        TryAgainError: If it cannot be read now.
    """
    chain = [store.get(s.key) for s in version.stages]
    names = [s.name for s in version.stages]
    # `drop_candidate` refuses an unknown stage and the first one, with a better message.
    if stage not in names or names.index(stage) in (0, len(names) - 1) or not what_remains(chain, stage):
        return None
    try:
        return served_measurements(head, version, store, gate, without=version.own_text(stage))
    except TryAgainError:
        raise
    except LifelongError as error:
        raise ConfigError(
            f"the gate of drop cannot read the run's text ({error}). --no-gate drops without it."
        ) from None


def _verdict(stage: str, candidate: DropCandidate) -> list[str]:
    """What the model retains of the dropped stage, in lines for the operator."""
    if candidate.chain[-1].name != f"{stage}.dropped":
        return [f"as if stage {stage} had never been added: the model is stage {candidate.stage.key[:SHORT]} again."]
    kept = f"the files of stage {stage} stay in the store: later stages continue from it."
    if not candidate.remains:
        return [f"the experts of stage {stage} are gone, and nothing of its text remains in the model;", kept]
    return [
        f"the experts of stage {stage} are gone, but this of its text remains in the model:",
        *(f"· {sentence}" for sentence in candidate.remains),
        kept,
    ]
