"""The lineage of one expert: trace it back to its training text, and trace a document to the experts that learned it.

:func:`trace_expert` answers the first, :func:`readers` the second; a whole model is listed in
:mod:`lifelong_moe.store.lineage`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lifelong_moe.config.parts import expert_tensor
from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.store.lineage import expert_names, grouped_names
from lifelong_moe.store.stages import CommittedStage

Holders = Callable[[CommittedStage], Mapping[str, str]]
"""Key of the holder of each tensor that a stage borrows: :meth:`lifelong_moe.store.stages.StageStore.holders`."""
EXPERT_NAME = re.compile(r"(?P<stage>.+)/L(?P<layer>\d+)/E(?P<expert>\d+)")


@dataclass(frozen=True, kw_only=True)
class Birth:
    """The stage that created an expert."""

    stage: str
    key: str
    data: dict[str, str]
    """Hash of each distribution's training documents."""
    began: str
    """Initialization of its weights: ``grow.init``, or ``random`` in a first stage, or ``imported`` by a checkpoint."""
    weights_sha256: str


@dataclass(frozen=True, kw_only=True)
class Custody:
    """How one stage treated an expert."""

    stage: str
    key: str
    tensors: Literal["trained", "borrowed", "moved", "imported"]
    """``moved``: stored again by a derived stage under another number, without training; ``imported``: as a checkpoint
    had it."""
    held_by: str
    """Key of the stage that holds the tensors."""
    data: dict[str, str]
    """Hash of each distribution that it was trained on there; empty unless ``trained``."""


@dataclass(frozen=True, kw_only=True)
class ExpertTrace:
    """The history of an expert, from its birth to the last stage of the model."""

    expert: str
    born: Birth
    stages: list[Custody]
    """One entry per stage, the birth stage first."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A stage that read a set of training documents."""

    stage: str
    key: str
    distribution: str
    role: Literal["learned", "replayed", "measured"]
    """``measured`` for the Fisher information of EWC."""
    epochs: float | None
    """Passes over the stage's own distribution; below 1 it may not have reached the document, nor need replay have."""
    experts: str
    """Names of the experts that it trained, abbreviated."""


def trace_expert(chain: Sequence[CommittedStage], holders: Holders, name: str) -> ExpertTrace:
    """Trace an expert back to its training text.

    Args:
        chain: The model's stages, oldest first, derived ones included.
        holders: Of the store.
        name: ``STAGE/L<layer>/E<index>``, numbered as in the last stage.

    Raises:
        ConfigError: If the name is malformed, or the model has no such expert.
    """
    layer, place = _find(chain[-1].architecture, name)
    stage_name = name.rsplit("/", 2)[0]
    birth = next(i for i, stage in enumerate(chain) if stage.name == stage_name)
    stages: list[Custody] = []
    # Backwards, because the name counts layers as the last stage does and a smaller model renumbers them on the way.
    for stage in reversed(chain[birth:]):
        stages.insert(0, _custody(stage, holders(stage), stage_name, (layer, place)))
        layer = _layer_before(stage, layer)
    born = chain[birth]
    began = "imported" if born.is_imported else born.spec.grow.init.value if born.spec.grow else "random"
    first = Birth(stage=born.name, key=born.key, data=born.data, began=began, weights_sha256=born.weights_hash)
    return ExpertTrace(expert=name, born=first, stages=stages)


def _find(architecture: Architecture, name: str) -> tuple[int, int]:
    """The layer of a named expert, and its place within its generation."""
    match = EXPERT_NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"--expert={name}: an expert's name is STAGE/L<layer>/E<index>, such as python_code/L0/E4.")
    layer, expert = int(match["layer"]), int(match["expert"])
    births = architecture.expert_births(layer) if layer < architecture.model.layers else []
    if expert >= len(births) or births[expert] != match["stage"]:
        there = [expert_names(architecture, generation.stage) for generation in architecture.generations]
        raise ConfigError(f"--expert={name}: the model has no such expert; it has {', '.join(there)}.")
    # Removing experts shifts indices, but keeps the order within a generation.
    return layer, expert - births.index(match["stage"])


def _layer_before(stage: CommittedStage, layer: int) -> int:
    """Number of a layer in the stage's parent, of which a student keeps some layers, renumbered."""
    kept = stage.spec.student
    # A derived stage repeats the spec of its source but starts from the source's own layers.
    return layer if kept is None or stage.derived else kept[layer]


def _custody(stage: CommittedStage, borrowed: Mapping[str, str], birth: str, at: tuple[int, int]) -> Custody:
    layer, place = at
    index = stage.architecture.expert_births(layer).index(birth) + place
    name = _tensor_of(stage.architecture, layer, index, birth)
    # A trained stage stores exactly the tensors that it changed; a derived one stores some without training them.
    how = _tensors(stage, name in borrowed)
    return Custody(
        stage=stage.name,
        key=stage.key,
        tensors=how,
        held_by=borrowed.get(name, stage.key),
        data=stage.data if how == "trained" else {},
    )


def _tensors(stage: CommittedStage, is_borrowed: bool) -> Literal["trained", "borrowed", "moved", "imported"]:
    if is_borrowed:
        return "borrowed"
    return "imported" if stage.is_imported else "moved" if stage.derived else "trained"


def _tensor_of(architecture: Architecture, layer: int, expert: int, birth: str) -> str:
    """The tensor that stands for an expert: a stage holds or borrows experts whole."""
    is_low_rank = architecture.generations[architecture.born_in(birth)].rank
    return expert_tensor(layer, expert, "down_a" if is_low_rank else "down")


def trained_experts(stage: CommittedStage, borrowed: Collection[str]) -> str:
    """Names of the experts that a stage trained, abbreviated; ``none`` for a derived stage.

    Args:
        stage: The stage.
        borrowed: Names of the tensors that others hold.
    """
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
                    if birth == generation.stage and _tensor_of(architecture, layer, expert, birth) not in borrowed
                ]
                for layer in births
            }
            for generation in architecture.generations
        }
    )


def readers(
    stages: Sequence[CommittedStage], holders: Holders, splits: Collection[str], left_out: Collection[str] = ()
) -> list[Reader]:
    """Find the stages that read any of these sets of training documents, and the experts that learned from them.

    Args:
        stages: In any order.
        holders: Of the store.
        splits: Split hashes of the sets, as stages record them.
        left_out: Split hashes of sets where the document is a near copy of held-out text, which only stages of
            earlier versions read.
    """
    return [
        Reader(
            stage=stage.name,
            key=stage.key,
            distribution=distribution,
            role=_role(stage.spec, distribution),
            epochs=(stage.metrics.get("epochs_by_distribution") or {}).get(distribution, stage.metrics.get("epochs")),
            experts=trained_experts(stage, holders(stage)),
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
