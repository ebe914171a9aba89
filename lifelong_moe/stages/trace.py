"""Back from an expert to the text that made it, and from a document to the experts that learned from it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from lifelong_moe.errors import ConfigError
from lifelong_moe.model.parts import expert_tensor
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.stages.lineage import expert_names, grouped_names
from lifelong_moe.stages.store import CommittedStage

EXPERT_NAME = re.compile(r"(?P<stage>.+)/L(?P<layer>\d+)/E(?P<expert>\d+)")
MATRIX = "down"
"""A matrix that every kind of expert has."""


def trace_expert(chain: Sequence[CommittedStage], name: str) -> dict[str, Any]:
    """Which stage and which text made an expert.

    Args:
        chain: The model's stages, oldest first, derived ones included.
        name: ``STAGE/L<layer>/E<index>``, as the last of them numbers its experts.

    Returns:
        ``expert``; ``born`` (``stage``, ``key``, ``data``: hash of each distribution's training documents,
        ``began``: how its weights began); and ``stages``, one entry for the birth and each stage after it: ``stage``,
        ``key``, ``tensors`` (``trained``, ``borrowed``, or ``moved`` where only its number changed), ``held_by`` (key
        of the stage that holds the tensors) and ``data`` (what it was trained on there; empty otherwise).

    Raises:
        ConfigError: If the name is malformed, or the model has no such expert.
    """
    layer, place = _find(chain[-1].architecture, name)
    stage_name = name.rsplit("/", 2)[0]
    birth = next(i for i, stage in enumerate(chain) if stage.name == stage_name)
    rows: list[dict[str, Any]] = []
    for stage in reversed(chain[birth:]):
        rows.insert(0, _history(stage, layer, stage_name, place))
        layer = _layer_before(stage, layer)
    born = chain[birth]
    return {
        "expert": name,
        "born": {
            "stage": born.name,
            "key": born.key,
            "data": born.data,
            "began": str(born.spec.grow.init) if born.spec.grow else "random",
            "weights_sha256": born.weights_hash,
        },
        "stages": rows,
    }


def _find(architecture: Architecture, name: str) -> tuple[int, int]:
    """Layer, and place within its generation."""
    match = EXPERT_NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"--expert={name}: an expert's name is STAGE/L<layer>/E<index>, such as python_code/L0/E4.")
    layer, expert = int(match["layer"]), int(match["expert"])
    births = architecture.expert_births(layer) if layer < architecture.model.layers else []
    if expert >= len(births) or births[expert] != match["stage"]:
        there = [expert_names(architecture, generation.stage) for generation in architecture.generations]
        raise ConfigError(f"--expert={name}: the model has no such expert; there are {', '.join(there)}.")
    return layer, expert - births.index(match["stage"])


def _layer_before(stage: CommittedStage, layer: int) -> int:
    """The number that a layer has in the stage's parent; a student has some of its layers, numbered anew."""
    kept = stage.spec.student
    # A derived stage repeats the spec of the stage that it was made of, whose layers it has.
    return layer if kept is None or stage.derived else kept[layer]


def _history(stage: CommittedStage, layer: int, birth: str, place: int) -> dict[str, Any]:
    """What a stage did with an expert."""
    index = stage.architecture.expert_births(layer).index(birth) + place
    name = expert_tensor(layer, index, MATRIX)
    how = "borrowed" if name in stage.borrowed else "moved" if stage.derived else "trained"
    return {
        "stage": stage.name,
        "key": stage.key,
        "tensors": how,
        "held_by": stage.borrowed.get(name, stage.key),
        "data": stage.data if how == "trained" else {},
    }


def trained_experts(stage: CommittedStage) -> str:
    """Names of the experts whose weights a stage trained, in short; a derived stage trained none."""
    if stage.derived:
        return "none"
    architecture = stage.architecture
    births = {layer: architecture.expert_births(layer) for layer in range(architecture.model.layers)}
    return grouped_names(
        {
            generation.stage: {
                layer: [
                    expert
                    for expert, birth in enumerate(births[layer])
                    if birth == generation.stage and expert_tensor(layer, expert, MATRIX) not in stage.borrowed
                ]
                for layer in births
            }
            for generation in architecture.generations
        }
    )


def readers(
    stages: Sequence[CommittedStage], splits: Collection[str], left_out: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Which stages read any of these sets of training documents, and which experts learned there.

    Args:
        stages: In any order.
        splits: Hashes of these sets, near copies of held-out text included, as stages record them.
        left_out: The same of sets whose near copies alone are asked about: stages of earlier versions read those too.

    Returns:
        One entry a stage that did: ``stage``, ``key``, ``distribution``, ``role`` (``learned``, ``replayed``, or
        ``measured`` for the Fisher information of EWC), ``epochs`` (times the text of its own distribution was gone
        through; below 1 the document may not have had its turn, as with replay) and ``experts`` (that it trained).
    """
    rows = []
    for stage in stages:
        if stage.derived:
            continue
        for distribution, digest in stage.split.items():
            if digest in splits or (digest in left_out and stage.read_near_copies):
                rows.append(
                    {
                        "stage": stage.name,
                        "key": stage.key,
                        "distribution": distribution,
                        "role": _role(stage.spec, distribution),
                        "epochs": stage.metrics.get("epochs"),
                        "experts": trained_experts(stage),
                    }
                )
    return rows


def _role(spec: StageSpec, distribution: str) -> str:
    if distribution in spec.learns:
        return "learned"
    return "replayed" if distribution in spec.reads else "measured"
