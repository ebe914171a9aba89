"""Stages that are derived from another one without training: a generation removed from a model, or experts merged.

A derived stage's content address consists of its source and the operation; its record holds both under ``derived``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lifelong_moe.config.growth import ExpertInit
from lifelong_moe.config.retention import TrunkTraining
from lifelong_moe.errors import ConfigError
from lifelong_moe.growth.remove import remove_generation
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.spec import StageSpec, own_text
from lifelong_moe.storage.keys import content_key
from lifelong_moe.store.record import StageRecord
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.training.restore import load_model


def derived_stage(store: StageStore, source: CommittedStage, name: str) -> CommittedStage:
    """Commit a stage's model without the experts born in another stage, or find it committed.

    Args:
        store: Where the stages are.
        source: The stage whose model it is.
        name: Stage whose generation is removed.

    Raises:
        ConfigError: If the model holds no experts that were born in that stage, or they cannot be removed.
    """
    identity = {"derived": "drop", "from": source.key, "stage": name}
    key = content_key(identity)
    if (found := store.find(key)) is not None:
        return found
    generation = generation_of(source.architecture, name)
    load_model(store, source)  # only for its errors: tensors that are not those of the architecture
    architecture, left = remove_generation(source.architecture, store.tensors(source), generation)
    return commit_derived(store, source, identity, f"{name}.dropped", architecture, left)


def commit_derived(
    store: StageStore,
    source: CommittedStage,
    identity: Mapping[str, Any],
    name: str,
    architecture: Architecture,
    left: Mapping[str, Tensor],
) -> CommittedStage:
    """Commit a model made of another one's tensors.

    Args:
        store: Where the stages are.
        source: The stage that held the tensors.
        identity: Source and operation; its content address.
        name: The stage's name.
        architecture: Of the model.
        left: Its tensors.
    """
    key, tensors = content_key(identity), store.tensors(source)
    with torch.device("meta"):  # names alone, without memory
        expected = set(LanguageModel(architecture).state_dict())
    assert set(left) == expected, sorted(set(left) ^ expected)
    # A stage borrows by name, so experts that move up by the removed ones' number are stored again.
    borrowed = {n for n in left if n in tensors and torch.equal(left[n], tensors[n])}
    record = StageRecord(
        key=key,
        name=name,
        parent=source.key,
        spec=source.spec,
        architecture=architecture,
        data={},
        split={},
        tokenizer=source.tokenizer,
        removed=tuple(sorted(tensors.keys() - left.keys())),
        derived=dict(identity),
    )
    return store.commit(record, {}, {n: t for n, t in left.items() if n not in borrowed})


def generation_of(architecture: Architecture, name: str) -> int:
    """The generation that was born in a stage.

    Raises:
        ConfigError: If none was.
    """
    births = [generation.stage for generation in architecture.generations]
    if name not in births:
        raise ConfigError(
            f"the model holds no experts born in stage {name}: it added none, or they were dropped before; the weights "
            f"that it trained are shared by all stages. To undo it, roll back to a version before it: "
            f"lifelong-moe rollback."
        )
    return births.index(name)


def what_remains(chain: Sequence[CommittedStage], name: str) -> list[str]:
    """What a model retains of a stage's text after the stage's own experts are dropped.

    Args:
        chain: The model's stages, oldest first, derived ones included.
        name: The stage; one of them.

    Returns:
        Sentences; none if it retains nothing.
    """
    # Derived stages carry their source's specification, so they would count it twice.
    trained = [stage for stage in chain if stage.derived is None]
    index = next(i for i, stage in enumerate(trained) if stage.name == name)
    own, found = trained[index].spec, list[str]()
    texts = own_text(own.learns, {text for stage in trained[:index] for text in stage.spec.learns})
    # Without a trunk section the shared parts train like everything else.
    trunk = own.trunk.train if own.trunk else TrunkTraining.full
    if trunk in (TrunkTraining.full, TrunkTraining.gentle):
        found.append(f"the trunk trained on it (trunk.train={trunk}), and all later stages began from that trunk")
    if own.grow and own.grow.old_lr_scale > 0:
        found.append(f"older experts trained on it (grow.old_lr_scale={own.grow.old_lr_scale:g})")
    for stage in trained[index + 1 :]:
        found += [f"stage {stage.name} {how}" for how in _carried_on(stage.spec, texts)]
    return found


def _carried_on(spec: StageSpec, texts: Collection[str]) -> list[str]:
    """Ways in which a later stage learned from some texts, or from a model that had learned them."""
    # Bundles choose by centroids, and other modes without rows by labels: only learned rows compete with older ones.
    routes_anew = spec.routing.mode == "learned" and not spec.routing.by_generation
    ways = {f"learned {text} itself": text in spec.new for text in texts}
    ways |= {f"replayed {text}": text not in spec.new and text in spec.reads for text in texts}
    ways |= {
        "trained on text that a model with it had written": spec.generates,
        "was distilled from a model with it": spec.distill is not None,
        "weighted its penalty by text that a model with it had written": spec.measures_generated,
        **{f"weighted its penalty by {text}": text in spec.fisher_data for text in texts},
        "initialized its experts as copies of the most used ones, possibly its own": spec.grow is not None
        and spec.grow.init == ExpertInit.copy,
        "trained its router rows in competition with its own": spec.grow is not None and routes_anew,
    }
    return [way for way, holds in ways.items() if holds]
