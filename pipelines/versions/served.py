"""The stages that serve: those of a version, and a run's versions. Without torch, which an idle tick has no use for."""

from __future__ import annotations

from lifelong_moe.data.arrivals.batches import BatchStore
from lifelong_moe.plan.retraining import NewStage
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import timestamp
from lifelong_moe.store.stages import StageStore
from lifelong_moe.store.versions import Version, base_stages
from pipelines.shared.places import ROOT


def with_versions(store: StageStore, head: RunHead) -> RunHead:
    """A head with versions: its own, or the finished run as version 0."""
    # `run` writes no versions; the first command that needs them makes the list.
    if head.versions:
        return head
    head.require_finished()
    return head.with_base(base_stages(store.chain(head.plan[-1])), timestamp())


def served_stages(version: Version, store: StageStore) -> tuple[list[str], list[NewStage]]:
    """Stages that are still in a version's model: names of the base's, and those that retraining added."""
    names = {stage.name for stage in version.stages}
    there = [s for s in version.stages if f"{s.name}.dropped" not in names and s.action not in ("drop", "consolidate")]
    kept = [stage.name for stage in there if stage.batch is None]
    added = [
        NewStage(
            s.name,
            batch_files(s.batch, s.sources),
            store.get(s.key).spec.continues,
            heldout_fraction=s.heldout_fraction,
            heldout_sources=s.heldout_sources,
        )
        for s in there
        if s.batch is not None
    ]
    return kept, added


def batch_files(batch: str, sources: str | None) -> str:
    """Path of a stored batch's documents, in the copy with these sources."""
    return str(BatchStore(ROOT).path(batch, sources))
