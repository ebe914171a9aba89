"""Measure a candidate and the champion on the held-out text of every distribution, and judge by the gate.

The bounds themselves are computed by :func:`lifelong_moe.retraining.bounds.difference_bounds`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lifelong_moe.config.retraining.policy import GateConfig
from lifelong_moe.data.text.documents import Document
from lifelong_moe.evaluation.measurements import Measurements
from lifelong_moe.retraining.bounds import DocumentLosses
from lifelong_moe.retraining.checks import Verdict
from lifelong_moe.retraining.gate import Evidence, judge
from lifelong_moe.retraining.power import passing_chances
from lifelong_moe.retraining.predicted import Power
from lifelong_moe.retraining.slices import require_text
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.store.ticks import BestLoss
from lifelong_moe.store.versions import Version
from pipelines.versions.candidates import Candidate, CandidateTrainer, changed_frozen


def gate(
    trainer: CandidateTrainer, candidate: Candidate, stage: CommittedStage, best: Mapping[str, BestLoss]
) -> Verdict:
    """Measure a trained candidate and judge it.

    Args:
        trainer: Of the batch's candidates.
        candidate: The plan of the stage.
        stage: The trained stage.
        best: Best loss of each old distribution so far.
    """
    new, before = trainer.new, trainer.parent
    old, losses = candidate.measurements.measurable(without=[new]), candidate.measurements.losses
    peers = {}
    for name in old:
        # A loss on other held-out text is no baseline. Then, and if that stage is gone, the champion stands in.
        known = best.get(name)
        same = known is not None and known.heldout == candidate.data.records[name].heldout_hash
        peers[name] = trainer.store.find(known.key) if known is not None and same else None
    with trainer.console.status(f"{stage.name}: at the gate"):
        # One model after the other: each is loaded once.
        after = {name: losses(stage.key, name) for name in (new, *old)}
        earlier = {name: losses(before.key, name) for name in (new, *old)}
        finest = {name: losses((peers[name] or before).key, name) for name in old}
        leaks = {name: trainer.leak(stage, candidate, name) for name in old}
        found = Evidence(
            new=new,
            after=after,
            before=earlier,
            best=finest,
            changed_frozen=changed_frozen(trainer.store, before, stage),
            leaks=leaks,
            kinds=kinds_of_text(trainer.champion, trainer.store),
        )
        judged = judge(found, trainer.retraining.settings.gate, seed=candidate.config.seed)
        return replace(judged, notes=tuple(candidate.measurements.unmeasurable()))


def require_slices(config: GateConfig, heldout: Mapping[str, Sequence[Document]]) -> None:
    """Require held-out documents of each of the gate's slices, before anything is trained for it.

    Args:
        config: The gate's.
        heldout: Held-out documents by old distribution.

    Raises:
        ConfigError: If there are too few.
    """
    if config.slices:
        require_text(config, {name: [one.source for one in documents] for name, documents in heldout.items()})


def kinds_of_text(version: Version, store: StageStore) -> dict[str, str]:
    """Kind of each distribution of a version, for pooling: a stage that continues another is of its kind."""
    by_stage: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for stage in version.stages:
        if stage.action not in ("drop", "consolidate"):  # they train nothing
            continues = store.get(stage.key).spec.continues
            by_stage[stage.name] = by_stage.get(continues or "", kinds.get(stage.data, stage.data))
            kinds.setdefault(stage.data, by_stage[stage.name])
            # A mixture is of several kinds, of which the first one stands for those that continue it.
            for name in stage.mixed:
                kinds.setdefault(name, name)
    return kinds


def best_losses(trainer: CandidateTrainer, candidate: Candidate, best: Mapping[str, BestLoss]) -> dict[str, BestLoss]:
    """The lowest loss of each old distribution from the stage that learned it to the champion, both included.

    Stages that are no longer in the store are left out, with a message.

    Args:
        trainer: Of the batch's candidates.
        candidate: Gives data and settings of the measurements.
        best: Best losses of earlier ticks; empty at the first one.
    """
    # Measured anew at each tick, since held-out text may have changed; measurements are found by content.
    measurements = candidate.measurements
    found = updated_best(measurements, trainer.parent, best, measurements.measurable())
    for learned in trainer.champion.stages:
        if not (names := [name for name in learned.learns if name in measurements.measurable()]):
            continue
        if (stage := trainer.store.find(learned.key)) is None:
            trainer.console.print(
                f"Stage {learned.name} is not in the store any more: the best that {', '.join(names)} ever had is "
                f"counted without it.",
            )
            continue
        found = updated_best(measurements, stage, found, names)
    return found


def updated_best(
    measurements: Measurements, stage: CommittedStage, best: Mapping[str, BestLoss], names: Iterable[str]
) -> dict[str, BestLoss]:
    """Best losses with those of a stage on some distributions taken into account."""
    found = dict(best)
    for name in names:
        heldout = measurements.data.records[name].heldout_hash
        nats = measurements.losses(stage.key, name).nats_per_token
        # Losses on other held-out text do not compare: the record begins anew.
        if name not in found or found[name].heldout != heldout or nats < found[name].nats:
            found[name] = BestLoss(key=stage.key, heldout=heldout, nats=nats)
    return found


def old_losses(
    trainer: CandidateTrainer, candidate: Candidate, stage: CommittedStage
) -> tuple[dict[str, DocumentLosses], dict[str, DocumentLosses]]:
    """Losses of a stage and of the champion on every old distribution."""
    measurements = candidate.measurements
    old = measurements.measurable(without=[trainer.new])
    # One model after the other: each is loaded once.
    after = {name: measurements.losses(stage.key, name) for name in old}
    return after, {name: measurements.losses(trainer.parent.key, name) for name in old}


def predicted_power(trainer: CandidateTrainer, probe: Candidate) -> Power | None:
    """Power of the gate, estimated from a probe; None without an old distribution, or if the probe was not run."""
    stage = trainer.store.find(probe.planned.key)
    # The batch's own distribution is always among the measurable ones.
    if stage is None or len(probe.measurements.measurable()) < 2:
        return None
    kinds, config = kinds_of_text(trainer.champion, trainer.store), trainer.retraining.settings.gate
    chances = passing_chances(*old_losses(trainer, probe, stage), kinds, config)
    weakest = min(chances, key=lambda pool: chances[pool])
    return Power(math.prod(chances.values()), len(chances), ", ".join(weakest), chances[weakest])
