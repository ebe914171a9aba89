"""The end of a stage: what it changed is committed, and what it did not is borrowed."""

from __future__ import annotations

from typing import Any

import torch

from lifelong_moe.errors import DivergedError
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.spec import SCHEMA
from lifelong_moe.store.record import StageRecord
from lifelong_moe.store.stages import CommittedStage
from lifelong_moe.training.loop.context import StageRun


def commit_stage(run: StageRun, model: LanguageModel, metrics: dict[str, Any]) -> CommittedStage:
    """Commit what this stage changed; what it did not change is borrowed, and proved to be the same bits.

    Raises:
        DivergedError: If a tensor holds values that are not finite.
        RuntimeError: If a frozen tensor changed: a bug of ours.
    """
    state, name, store, parent = model.state_dict(), run.spec.name, run.environment.store, run.parent
    trained = model.stored_names(trained=True)
    borrowed: dict[str, str] = {}
    if parent is not None:
        old = store.tensors(parent)
        same = (n for n in old if n in state and n not in trained and torch.equal(old[n], state[n].cpu()))
        borrowed = {n: store.holder(parent, n) for n in same}
        if changed := sorted(model.stored_names(trained=False) & set(old) - set(borrowed)):
            raise RuntimeError(f"stage {name}: frozen tensor {changed[0]} changed in training")
    own = {n: tensor for n, tensor in state.items() if n not in borrowed}
    for n, tensor in own.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DivergedError(f"stage {name}: {n} holds values that are not finite; nothing was committed.")
    tokenizer = run.data.tokenizer.text if parent is None else None  # its descendants find it there
    return store.commit(_record(run, model, borrowed), metrics, own, tokenizer)


def _record(run: StageRun, model: LanguageModel, borrowed: dict[str, str]) -> StageRecord:
    """What was trained, on what."""
    spec, corpora = run.spec, run.corpora
    return StageRecord(
        schema=SCHEMA,
        key=run.planned.key,
        name=spec.name,
        parent=run.parent.key if run.parent else None,
        spec=spec,
        architecture=model.architecture,
        data={name: corpora[name].train_hash for name in spec.uses},
        split={name: corpora[name].split_hash for name in spec.uses},
        tokenizer=run.data.identity.tokenizer,
        borrowed=borrowed,
    )
