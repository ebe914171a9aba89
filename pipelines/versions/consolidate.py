"""`lifelong-moe consolidate`: merge experts that are alike and little used, where no more may be added."""

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
from lifelong_moe.growth.merge import closest_pair, merge_experts
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.retraining import read_gate
from lifelong_moe.storage.locks import locked
from lifelong_moe.store.runs import RunRecord, require_head, timestamp
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.store.versions import Version, VersionStage, describe
from lifelong_moe.training.derived import commit_derived, generation_of
from lifelong_moe.training.loop.device import configured_device
from lifelong_moe.training.restore import build_model, load_model
from pipelines.shared.places import ROOT
from pipelines.shared.recorded import follow_champion
from pipelines.versions.drop import with_versions
from pipelines.versions.gate_derived import gate_derived, served_measurements
from pipelines.versions.render import print_verdict

SAMPLE_TOKENS = 8192
"""Training tokens of each distribution that usage and likeness are measured on."""


def consolidate(run: str, stage: str, experts: int, console: Console, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Merge experts born in a stage into others, one at a time in each layer, and let the result serve if it may.

    Args:
        run: Its name.
        stage: Whose generation shrinks.
        experts: By how many experts a layer.
        console: Where people read.
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
        served = served_measurements(head, before, store)
        with console.status(f"{stage}: looking for experts that are alike"):
            made, merged = _merged(store, source, served, before, stage, experts)
        judged = gate_derived(store, before, made, served, None, settings, console)
        print_verdict(console, judged)
        outcome = "promoted" if judged.passed else "rejected"
        if judged.passed:
            added = VersionStage(name=made.name, key=made.key, data=before.stages[-1].data, action="consolidate")
            reason = f"{experts} fewer experts of stage {stage} in each layer"
            head = head.promoted("consolidated", (*before.stages, added), reason, timestamp())
        now = head.champion
        facts = {"stage": stage, "key": made.key, "merged": merged}
        record.log("consolidate", outcome=outcome, champion=now.id, **facts)
        record.set_head(head)
        for one in merged:
            console.print(
                f"layer {one['layer']}: expert {one['gone']} merged into expert {one['kept']}", highlight=False
            )
        console.print(f"{run}: serves: {describe(now)}", highlight=False)
        follow_champion(head, console)
    if not judged.passed:
        console.print(f"rejected: {judged.reasons[0]}", highlight=False)
    return {"run": run, "outcome": outcome, "champion": now.id, **facts}


def _merged(
    store: StageStore, source: CommittedStage, served: Measurements, version: Version, stage: str, experts: int
) -> tuple[CommittedStage, list[dict[str, int]]]:
    """Merge, commit, and say what went where; experts are numbered as they were just before each merger."""
    architecture = source.architecture
    generation, tensors = generation_of(architecture, stage), store.tensors(source)
    born = architecture.generations[generation].experts
    if not 0 < experts < born:
        raise ConfigError(f"--experts={experts}: stage {stage} has {born} experts a layer, of which one must be left.")
    config, data = served.config, served.data
    names = served.measurable()  # held-out text where training text is gone
    texts = [(evaluation_windows(data.at_hand(n), config.model.context, SAMPLE_TOKENS), n) for n in names]
    merged: list[dict[str, int]] = []
    device = configured_device(config.trainer)
    model = load_model(store, source).to(device)
    for _ in range(experts):
        pairs, counts = _closest(model, texts, generation, config.evaluate.batch_tokens)
        try:
            architecture, tensors = merge_experts(architecture, tensors, generation, pairs, counts)
        except ValueError as error:
            raise ConfigError(f"stage {stage}: {error}.") from None
        merged += [{"layer": layer, "kept": kept, "gone": gone} for layer, (kept, gone) in pairs.items()]
        model = build_model(architecture, tensors).to(device)
    taken = {s.name for s in version.stages}
    name = next(n for i in range(len(taken) + 1) if (n := f"{stage}.consolidated{i or ''}") not in taken)
    identity = {"derived": "consolidate", "from": source.key, "stage": stage, "experts": experts}
    identity |= {"text": [_text_hash(data, n) for n in names], "tokens": SAMPLE_TOKENS}
    return commit_derived(store, source, identity, name, architecture, tensors), merged


def _text_hash(data: PreparedData, name: str) -> str:
    record = data.records[name]
    return record.train_hash if name in data.corpora else record.heldout_hash


def _closest(
    model: LanguageModel, texts: list[tuple[EvaluationSet, str]], generation: int, batch_tokens: int
) -> tuple[dict[int, tuple[int, int]], dict[int, Tensor]]:
    """The pair to merge in each layer that has the generation, and how often each expert is used there."""
    similarities = expert_similarities(model, texts)
    usage = [evaluate(model, w, distribution=n, batch_tokens=batch_tokens).expert_counts for w, n in texts]
    architecture, pairs, counts = model.architecture, {}, {}
    for layer in range(architecture.model.layers):
        numbers = [g.experts_in(layer) for g in architecture.generations]
        if not numbers[generation]:
            continue
        first, frozen = sum(numbers[:generation]), sum(numbers[: architecture.frozen])
        counts[layer] = torch.tensor([one[layer] for one in usage]).sum(dim=0)
        likeness = torch.as_tensor(similarities[layer])
        goes = range(first, first + numbers[generation])
        pairs[layer] = closest_pair(likeness, counts[layer], range(frozen), goes)
    return pairs, counts
