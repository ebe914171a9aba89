"""Back from an expert to the text that made it, and from a document to the experts that learned from it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from lifelong_moe.config.parts import expert_tensor
from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.store.lineage import expert_names, grouped_names
from lifelong_moe.store.stages import CommittedStage

EXPERT_NAME = re.compile(r"(?P<stage>.+)/L(?P<layer>\d+)/E(?P<expert>\d+)")
MATRIX = "down"
"""A matrix that every kind of expert has."""


@dataclass(frozen=True, kw_only=True)
class Birth:
    """The stage that created an expert."""

    stage: str
    key: str
    data: dict[str, str]
    """Hash of each distribution's training documents."""
    began: str
    """How its weights began: ``grow.init``, or ``random`` in a first stage."""
    weights_sha256: str


@dataclass(frozen=True, kw_only=True)
class Custody:
    """What one stage did with an expert."""

    stage: str
    key: str
    tensors: Literal["trained", "borrowed", "moved"]
    """``moved`` where only its number changed."""
    held_by: str
    """Key of the stage that holds the tensors."""
    data: dict[str, str]
    """What it was trained on there; empty unless it was."""


@dataclass(frozen=True, kw_only=True)
class ExpertTrace:
    """Which stage and which text made an expert."""

    expert: str
    born: Birth
    stages: list[Custody]
    """One entry for the birth and one for each stage after it."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A stage that read a set of training documents."""

    stage: str
    key: str
    distribution: str
    role: Literal["learned", "replayed", "measured"]
    """``measured`` for the Fisher information of EWC."""
    epochs: float | None
    """Passes over the text of its own distribution; below 1 the document may not have had its turn, as with replay."""
    experts: str
    """Those that it trained."""


def trace_expert(chain: Sequence[CommittedStage], name: str) -> ExpertTrace:
    """Trace an expert back to the text that made it.

    Args:
        chain: The model's stages, oldest first, derived ones included.
        name: ``STAGE/L<layer>/E<index>``, as the last of them numbers its experts.

    Raises:
        ConfigError: If the name is malformed, or the model has no such expert.
    """
    layer, place = _find(chain[-1].architecture, name)
    stage_name = name.rsplit("/", 2)[0]
    birth = next(i for i, stage in enumerate(chain) if stage.name == stage_name)
    stages: list[Custody] = []
    for stage in reversed(chain[birth:]):
        stages.insert(0, _custody(stage, layer, stage_name, place))
        layer = _layer_before(stage, layer)
    born = chain[birth]
    began = born.spec.grow.init.value if born.spec.grow else "random"
    first = Birth(stage=born.name, key=born.key, data=born.data, began=began, weights_sha256=born.weights_hash)
    return ExpertTrace(expert=name, born=first, stages=stages)


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


def _custody(stage: CommittedStage, layer: int, birth: str, place: int) -> Custody:
    index = stage.architecture.expert_births(layer).index(birth) + place
    name = expert_tensor(layer, index, MATRIX)
    is_trained = name not in stage.borrowed and not stage.derived
    return Custody(
        stage=stage.name,
        key=stage.key,
        tensors="trained" if is_trained else "borrowed" if name in stage.borrowed else "moved",
        held_by=stage.borrowed.get(name, stage.key),
        data=stage.data if is_trained else {},
    )


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


def readers(stages: Sequence[CommittedStage], splits: Collection[str], left_out: Collection[str] = ()) -> list[Reader]:
    """Which stages read any of these sets of training documents, and which experts learned there.

    Args:
        stages: In any order.
        splits: Hashes of these sets, near copies of held-out text included, as stages record them.
        left_out: The same of sets whose near copies alone are asked about: stages of earlier versions read those too.
    """
    return [
        Reader(
            stage=stage.name,
            key=stage.key,
            distribution=distribution,
            role=_role(stage.spec, distribution),
            epochs=stage.metrics.get("epochs"),
            experts=trained_experts(stage),
        )
        for stage in stages
        if not stage.derived
        for distribution, digest in stage.split.items()
        if digest in splits or (digest in left_out and stage.read_near_copies)
    ]


def _role(spec: StageSpec, distribution: str) -> Literal["learned", "replayed", "measured"]:
    if distribution in spec.learns:
        return "learned"
    return "replayed" if distribution in spec.reads else "measured"
