"""Stages that were not trained but derived from another: a generation taken out of a model, or experts merged.

A derived stage has an address like any other, made of what it derives from and how. Its ``config.json`` holds the same
under ``derived``, the stage it derives from as ``parent``, and that stage's ``spec``, which says what the model still
was trained by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lifelong_moe.errors import ConfigError
from lifelong_moe.growth.remove import remove_generation
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.stages.store import CommittedStage, StageStore
from lifelong_moe.storage.keys import content_key


def derived_stage(store: StageStore, source: CommittedStage, name: str) -> CommittedStage:
    """The model of a stage without the experts born in another one, committed; found if it was derived before.

    Tensors that keep their name and bits are borrowed. Later experts move up by as many places, so they are stored
    again: a stage borrows by name.

    Args:
        store: Where the stages are.
        source: Whose model it is.
        name: Stage whose generation goes.

    Raises:
        ConfigError: If the model holds no experts that were born in that stage, or they cannot go.
    """
    identity = {"derived": "drop", "from": source.key, "stage": name}
    key = content_key(identity)
    if (found := store.find(key)) is not None:
        return found
    before = Architecture.from_json(source.config["architecture"])
    tensors = store.tensors(source)
    architecture, left = remove_generation(before, tensors, generation_of(before, name))
    return commit_derived(store, source, identity, f"{name}.dropped", architecture, left)


def commit_derived(
    store: StageStore,
    source: CommittedStage,
    identity: Mapping[str, Any],
    name: str,
    architecture: Architecture,
    left: Mapping[str, Tensor],
) -> CommittedStage:
    """Commit a model that was made of another's tensors.

    Args:
        store: Where the stages are.
        source: Whose tensors they were; of these the ones that keep name and bits are borrowed.
        identity: What it derives from and how: its address.
        name: The stage's name.
        architecture: Of the model.
        left: Its tensors.
    """
    key, tensors = content_key(identity), store.tensors(source)
    with torch.device("meta"):
        expected = set(LanguageModel(architecture).state_dict())
    assert set(left) == expected, sorted(set(left) ^ expected)
    same = [n for n in left if n in tensors and torch.equal(left[n], tensors[n])]
    borrowed = {n: store.holder(source, n) for n in same}
    config = {
        "key": key,
        "name": name,
        "parent": source.key,
        "derived": dict(identity),
        "spec": source.config["spec"],
        "architecture": architecture.to_json(),
        "data": {},
        "tokenizer": source.config["tokenizer"],
    }
    return store.commit(config, {}, {n: t for n, t in left.items() if n not in borrowed}, borrowed)


def generation_of(architecture: Architecture, name: str) -> int:
    """Which generation was born in a stage.

    Raises:
        ConfigError: If none was.
    """
    births = [generation.stage for generation in architecture.generations]
    if name not in births:
        raise ConfigError(
            f"the model holds no experts born in stage {name}: it added none, or they were dropped before; what it "
            f"trained it shares with all stages. lifelong-moe rollback goes back to a version before it."
        )
    return births.index(name)


def what_remains(chain: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """What of a stage's text still is in a model once the stage's own experts are gone.

    Args:
        chain: ``config.json`` of the model's stages, oldest first, derived ones included.
        name: The stage; one of them.

    Returns:
        Sentences; none if nothing remains.
    """
    trained = [config for config in chain if "derived" not in config]
    index = next(i for i, config in enumerate(trained) if config["name"] == name)
    own, later = trained[index]["spec"], trained[index + 1 :]
    found = []
    trunk = own["trunk"]["train"] if own["trunk"] else "full"
    if trunk in ("full", "gentle"):
        found.append(f"the trunk trained on it (trunk.train={trunk}), and all later stages began from that trunk")
    if own["grow"] and own["grow"]["old_lr_scale"] > 0:
        found.append(f"older experts trained on it (grow.old_lr_scale={own['grow']['old_lr_scale']:g})")
    for config in later:
        found += [f"stage {config['name']} {how}" for how in _carried_on(config["spec"], own["data"])]
    return found


def _carried_on(spec: Mapping[str, Any], data: str) -> list[str]:
    """Ways in which a later stage learned from text of ``data``, or from a model that had."""
    found = []
    generates = bool(spec["replayed"]) and spec["replay_source"] == "generated"
    if spec["data"] == data:
        found.append(f"learned {data} itself")
    elif data in spec["replayed"] and not generates:
        found.append(f"replayed {data}")
    if generates:
        found.append("trained on text that a model with it had written")
    if spec["distill"]:
        found.append("was distilled from a model with it")
    if spec["penalty"] and spec["penalty"]["kind"] == "ewc" and spec["replay_source"] == "generated":
        found.append("weighed its penalty by text that a model with it had written")
    if data in spec["fisher_data"]:
        found.append(f"weighed its penalty by {data}")
    if spec["grow"] and spec["grow"]["init"] == "copy":
        found.append("began its experts as copies of those most used, perhaps of its own")
    if spec["grow"] and spec["routing"]["bundles"] == "none" and spec["routing"]["mode"] == "learned":
        found.append("trained its router rows beside its own")
    return found
