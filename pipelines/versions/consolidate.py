"""`lifelong-moe consolidate`: merge similar, little-used experts of a stage, to make room for new ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lifelong_moe.data.tokens.prepare import PreparedData
from lifelong_moe.data.tokens.windows import EvaluationSet, evaluation_windows
from lifelong_moe.errors import ConfigError
from lifelong_moe.evaluation.loss import evaluate
from lifelong_moe.evaluation.measurements import Measurements
from lifelong_moe.evaluation.probing import expert_similarities
from lifelong_moe.growth.merge import cheapest_pair, merge_experts
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.retraining import read_gate
from lifelong_moe.storage.locks import locked
from lifelong_moe.store.runs import RunRecord, require_head, timestamp
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.store.versions import Version, VersionStage, describe
from lifelong_moe.training.derived import commit_derived, generation_of
from lifelong_moe.training.loop.device import on_configured_device
from lifelong_moe.training.restore import build_model, load_model
from pipelines.shared.places import ROOT
from pipelines.shared.recorded import follow_champion
from pipelines.versions.gate_derived import gate_derived, served_measurements
from pipelines.versions.render import print_verdict
from pipelines.versions.served import with_versions

SAMPLE_TOKENS = 8192
"""Training tokens of each distribution on which usage and similarity are measured."""


def consolidate(run: str, stage: str, experts: int, console: Console, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Merge experts of a stage's generation, one per layer at a time, and promote the result if it passes the gate.

    Args:
        run: Its name.
        stage: Stage whose generation shrinks.
        experts: Number of experts to merge in each layer.
        console: Output for people.
        overrides: ``gate.KEY=VALUE``.

    Raises:
        ConfigError: If there is no such run or stage, or its experts cannot be merged; nothing is written then.
        LockedError: If another process works on the run.
    """
    settings = read_gate(overrides)
    require_head(ROOT, run)
    record, store = RunRecord(ROOT, run), StageStore(ROOT)
    with locked(record.lock_path, f"run {run}"):
        head = with_versions(store, require_head(ROOT, run))
        before = head.champion
        source = store.get(before.key)
        served = served_measurements(head, before, store, settings)
        for name, error in served.data.gone.items():
            console.print(f"{name}: held-out text, if kept, says how experts are used: {error}")
        with console.status(f"{stage}: looking for experts that are alike"):
            made, merged = _merged(store, source, served, before, stage, experts)
        verdict = gate_derived(store, before, made, served, (), settings, console)
        print_verdict(console, verdict)
        outcome = "promoted" if verdict.passed else "rejected"
        if verdict.passed:
            store.sign(made.key, head.centroids)
            added = VersionStage(name=made.name, key=made.key, data=before.stages[-1].data, action="consolidate")
            reason = f"{experts} fewer experts of stage {stage} in each layer"
            head = head.promoted("consolidated", (*before.stages, added), reason, timestamp())
        now = head.champion
        facts = {"stage": stage, "key": made.key, "merged": merged}
        # Ledger before head: a kill in between leaves a line too many and never a change without a line. The head is
        # saved after a rejection too: version 0, which the line may name, can be new in it.
        record.log("consolidate", outcome=outcome, champion=now.id, **facts)
        record.set_head(head)
        for one in merged:
            console.print(f"layer {one['layer']}: expert {one['gone']} merged into expert {one['kept']}")
        console.print(f"{run}: serves: {describe(now)}")
        follow_champion(head, console)
    if not verdict.passed:
        console.print(f"rejected: {verdict.reasons[0]}")
    return {"run": run, "outcome": outcome, "champion": now.id, **facts}


def _merged(
    store: StageStore, source: CommittedStage, served: Measurements, version: Version, stage: str, experts: int
) -> tuple[CommittedStage, list[dict[str, int]]]:
    """Merge and commit; returns the derived stage and the merged pairs.

    Experts are numbered as they were just before each merge.
    """
    architecture = source.architecture
    generation, tensors = generation_of(architecture, stage), store.tensors(source)
    born = architecture.generations[generation].experts
    if not 0 < experts < born:
        raise ConfigError(f"--experts={experts}: stage {stage} has {born} experts a layer, of which one must be left.")
    config, data = served.config, served.data
    names = served.measurable()  # held-out text where training text is gone
    texts = [(evaluation_windows(data.at_hand(n), config.model.context, SAMPLE_TOKENS), n) for n in names]
    merged: list[dict[str, int]] = []
    model = on_configured_device(load_model(store, source), config.trainer)
    # One at a time: each merge changes usage and similarity, so the next pair is chosen on the merged model.
    for _ in range(experts):
        pairs, counts = _cheapest_pairs(model, texts, generation, config.evaluate.batch_tokens)
        try:
            architecture, tensors = merge_experts(architecture, tensors, generation, pairs, counts)
        except ValueError as error:
            raise ConfigError(f"stage {stage}: {error}.") from None
        merged += [{"layer": layer, "kept": kept, "gone": gone} for layer, (kept, gone) in pairs.items()]
        model = on_configured_device(build_model(architecture, tensors), config.trainer)
    # Stage names are unique within a version: fruit.consolidated, fruit.consolidated1, and so on.
    taken = {s.name for s in version.stages}
    name = next(n for i in range(len(taken) + 1) if (n := f"{stage}.consolidated{i or ''}") not in taken)
    identity = {"derived": "consolidate", "from": source.key, "stage": stage, "experts": experts}
    identity |= {"text": [_text_hash(data, n) for n in names], "tokens": SAMPLE_TOKENS}
    return commit_derived(store, source, identity, name, architecture, tensors), merged


def _text_hash(data: PreparedData, name: str) -> str:
    record = data.records[name]
    return record.train_hash if name in data.corpora else record.heldout_hash


def _cheapest_pairs(
    model: LanguageModel, texts: list[tuple[EvaluationSet, str]], generation: int, batch_tokens: int
) -> tuple[dict[int, tuple[int, int]], dict[int, Tensor]]:
    """The pair to merge in each layer with the generation, and each expert's token count there."""
    similarities = expert_similarities(model, texts)
    usage = [evaluate(model, w, distribution=n, batch_tokens=batch_tokens).expert_counts for w, n in texts]
    architecture, pairs, counts = model.architecture, {}, {}
    for layer in range(architecture.model.layers):
        numbers = [g.experts_in(layer) for g in architecture.generations]
        if not numbers[generation]:
            continue
        first, frozen = sum(numbers[:generation]), sum(numbers[: architecture.frozen])
        # shape: (experts of the layer,), summed over distributions
        counts[layer] = torch.tensor([one[layer] for one in usage]).sum(dim=0)
        likeness = torch.as_tensor(similarities[layer])
        goes = range(first, first + numbers[generation])
        pairs[layer] = cheapest_pair(likeness, counts[layer], range(frozen), goes)
    return pairs, counts
