"""The end of a stage: commit the tensors that changed, and refer to the stages that hold the others."""

from __future__ import annotations

import torch
from torch import Tensor

from lifelong_moe.errors import DivergedError
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.key import SCHEMA
from lifelong_moe.store.record import StageRecord
from lifelong_moe.store.stages import CommittedStage
from lifelong_moe.training.loop.context import StageRun
from lifelong_moe.training.loop.measure import StageMetrics


def commit_stage(run: StageRun, model: LanguageModel, metrics: StageMetrics) -> CommittedStage:
    """Commit the tensors that this stage changed; the others are borrowed after a comparison of their bits.

    Raises:
        DivergedError: If a tensor holds values that are not finite.
        RuntimeError: If a frozen tensor changed, which is a bug.
    """
    state, name, store, parent = model.state_dict(), run.spec.name, run.environment.store, run.parent
    trained = model.stored_names(trained=True)
    borrowed, removed = set[str](), None
    if parent is not None:
        old = store.tensors(parent)
        # A tensor that the stage trains is its own even if its bits are the same: how often that happens is chance, and
        # what a stage holds should follow from its configuration.
        borrowed = {n for n in old if n in state and n not in trained and _is_same(old[n], state[n].cpu())}
        removed = tuple(sorted(old.keys() - state.keys()))
        # The invariant of the whole project: a frozen weight is never written again.
        if changed := sorted(model.stored_names(trained=False) & set(old) - borrowed):
            raise RuntimeError(f"stage {name}: frozen tensor {changed[0]} changed in training")
    own = {n: tensor for n, tensor in state.items() if n not in borrowed}
    # A non-finite weight would poison every later stage, and nothing could roll back past a commit.
    for n, tensor in own.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DivergedError(f"stage {name}: {n} holds values that are not finite; nothing was committed.")
    # Stored once, with the stage that made it; its descendants find it along the chain.
    made = run.data.tokenizer if parent is None else run.data.added.get(run.planned.index)
    text = made.text if made is not None else None
    return store.commit(_record(run, model, removed), metrics.to_json(), own, text)


def _is_same(stored: Tensor, held: Tensor) -> bool:
    """Whether a tensor is the stored one, in the numbers that training computes in."""
    # ``bf16-true`` rounds a float32 checkpoint for training; the store keeps what came in.
    return torch.equal(stored.to(held.dtype), held)


def _record(run: StageRun, model: LanguageModel, removed: tuple[str, ...] | None) -> StageRecord:
    """The stage's specification, model and data."""
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
        tokenizer=run.data.identity.at(run.planned.index).tokenizer,
        removed=removed,
    )
