"""The gate: a candidate against the champion, on the held-out text of every distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lifelong_moe.retraining.bounds import DocumentLosses
from lifelong_moe.retraining.gate import Verdict, judge
from lifelong_moe.retraining.power import passing_chances
from lifelong_moe.stages.store import CommittedStage, StageStore
from lifelong_moe.stages.versions import Version
from pipelines.candidates import Bench, Candidate, changed_frozen

Best = dict[str, dict[str, Any]]
"""By distribution: the key of the stage with the lowest loss ever on its held-out text, the text's hash, the loss."""


def gate(bench: Bench, candidate: Candidate, stage: CommittedStage, best: Best) -> Verdict:
    """Measure and judge.

    Args:
        bench: For the batch.
        candidate: What was planned.
        stage: What came of it.
        best: What the distributions had; only compared where it is of the same held-out text.
    """
    new, before = bench.new, bench.parent
    old = candidate.measured(without=new)

    def losses(one: CommittedStage, name: str) -> Any:
        return bench.losses(one, candidate, name)

    peers = {}
    for name in old:
        known = best.get(name)
        same = known is not None and known["heldout"] == candidate.data.records[name].heldout_hash
        peers[name] = bench.store.find(known["key"]) if known is not None and same else None
    with bench.console.status(f"{stage.name}: at the gate"):
        # One model after the other, for each is loaded once.
        after = {name: losses(stage, name) for name in (new, *old)}
        earlier = {name: losses(before, name) for name in (new, *old)}
        finest = {name: losses(peers[name] or before, name) for name in old}
        leaks = {name: bench.leak(stage, candidate, name) for name in old}
        judged = judge(
            new=new,
            after=after,
            before=earlier,
            best=finest,
            changed_frozen=changed_frozen(bench.store, before, stage),
            leaks=leaks,
            config=bench.retraining.settings.gate,
            seed=candidate.config.seed,
            kinds=kinds_of_text(bench.champion, bench.store),
        )
        return replace(judged, notes=tuple(candidate.unmeasured()))


def kinds_of_text(version: Version, store: StageStore) -> dict[str, str]:
    """The kind of each distribution that a version learned: what a stage continues is of the kind of that stage's."""
    by_stage: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for stage in version.stages:
        if stage.action not in ("drop", "consolidate"):  # those train nothing
            continues = store.get(stage.key).config["spec"].get("continues")
            by_stage[stage.name] = by_stage.get(continues, kinds.get(stage.data, stage.data))
            kinds.setdefault(stage.data, by_stage[stage.name])
    return kinds


def best_so_far(bench: Bench, candidate: Candidate, best: Best) -> Best:
    """The lowest loss of each old distribution since the stage that learned it, that stage and the champion included.

    A stage that is not in the store any more is left out, and that is said.

    Args:
        bench: For the batch.
        candidate: Gives data and settings.
        best: What earlier ticks found; empty at the first one.
    """
    found = with_best(bench, candidate, [bench.parent], best)
    for learned in bench.champion.stages:
        if learned.action in ("drop", "consolidate") or learned.data not in candidate.measured():
            continue
        if (stage := bench.store.find(learned.key)) is None:
            bench.console.print(
                f"Stage {learned.name} is not in the store any more: the best that {learned.data} ever had is counted "
                f"without it.",
                highlight=False,
            )
            continue
        found = with_best(bench, candidate, [stage], found, [learned.data])
    return found


def with_best(
    bench: Bench, candidate: Candidate, stages: list[CommittedStage], best: Best, names: Sequence[str] | None = None
) -> Best:
    """The lowest loss ever of each distribution (or of some), these stages included."""
    found = dict(best)
    for name in candidate.measured() if names is None else names:
        heldout = candidate.data.records[name].heldout_hash
        if name in found and found[name]["heldout"] != heldout:
            del found[name]
        for stage in stages:
            nats = bench.losses(stage, candidate, name).nats_per_token
            if name not in found or nats < found[name]["nats"]:
                found[name] = {"key": stage.key, "heldout": heldout, "nats": nats}
    return found


def old_losses(
    bench: Bench, candidate: Candidate, stage: CommittedStage
) -> tuple[dict[str, DocumentLosses], dict[str, DocumentLosses]]:
    """Losses of a stage, and of the champion, on every old distribution."""
    old = candidate.measured(without=bench.new)
    # One model after the other, for each is loaded once.
    after = {name: bench.losses(stage, candidate, name) for name in old}
    return after, {name: bench.losses(bench.parent, candidate, name) for name in old}


def foreseen_power(bench: Bench, probe: Candidate) -> dict[str, Any] | None:
    """How often the gate would pass a harmless candidate, if it scatters as a probe did; None without an old
    distribution, or where the probe was not made."""
    stage = bench.store.find(probe.planned.key)
    if stage is None or len(probe.measured()) < 2:
        return None
    kinds, config = kinds_of_text(bench.champion, bench.store), bench.retraining.settings.gate
    chances = passing_chances(*old_losses(bench, probe, stage), kinds, config)
    weakest = min(chances, key=lambda group: chances[group])
    return {
        "passes": math.prod(chances.values()),
        "checks": len(chances),
        "weakest": ", ".join(weakest),
        "weakest_passes": chances[weakest],
    }
