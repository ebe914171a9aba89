"""What a parameter is, told by the model's own structure, and that names of stored tensors say the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lifelong_moe.config.load import read_config
from lifelong_moe.config.model import ModelConfig, SharedMix
from lifelong_moe.config.parts import Part, Place, TensorName, expert_tensor, router_rows
from lifelong_moe.config.routing.base import Bundles
from lifelong_moe.growth.remove import renamed
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture, Generation, first_generation
from lifelong_moe.plan.cost import parameters_by_part
from lifelong_moe.plan.methods import stage_specs
from tests.conftest import routing_of

PRESETS = sorted((Path(__file__).resolve().parents[3] / "configs/presets").glob("*.yaml"))
MakeArchitecture = Callable[..., Architecture]


def skeleton(architecture: Architecture) -> LanguageModel:
    """A model without numbers."""
    with torch.device("meta"):
        return LanguageModel(architecture)


def check_names(model: LanguageModel) -> None:
    """Names say what the structure says, of parameters; and of all tensors they can be put together again."""
    stored = model.state_dict()
    assert all(str(TensorName.parse(name)) == name for name in stored)
    for name, place in model.places().items():
        said = TensorName.parse(name)
        assert said.layer == place.layer, name
        assert said.generation == place.generation and said.expert is None, name
    for layer, one in enumerate(model.moe_layers()):
        births = [g for g, generation in enumerate(one.banks.born) for _ in generation.indices]
        for expert, birth in enumerate(births):
            assert births[:expert].count(birth) == expert - births.index(birth)
            for matrix in one.banks.born[birth].tensors:
                assert expert_tensor(layer, expert, matrix) in stored


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_names_and_structure_agree_in_every_preset(path: Path) -> None:
    config = read_config(path).config
    chain: list[Architecture] = []
    for spec in stage_specs(config):
        parent = None if spec.parent is None else chain[spec.parent]
        chain.append(spec.architecture(parent, 64, 0))
    for architecture in chain:
        model = skeleton(architecture)
        check_names(model)
        counted = Counter[tuple[Part, int | None]]()
        for name, place in model.places().items():
            counted[place.part, place.generation] += model.get_parameter(name).numel()
        predicted = parameters_by_part(architecture)
        assert {key: num for key, num in predicted.items() if num} == {k: num for k, num in counted.items() if num}


def test_names_and_structure_agree_in_every_router(make_architecture: MakeArchitecture, any_router_kind: str) -> None:
    check_names(skeleton(make_architecture(any_router_kind, (4, 4, 4))))
    check_names(skeleton(make_architecture(any_router_kind, (4, Generation("b", 4, rank=2), 4))))


def test_places_by_hand() -> None:
    model = ModelConfig(
        layers=2, width=16, heads=4, kv_heads=2, expert_width=8, experts=2, context=16,
        moe_every=2, shared_experts=1, shared_mix=SharedMix.learned,
    )  # fmt: skip
    routing = routing_of(bundles=Bundles.label)
    born = (first_generation("s0", model), Generation("s1", 1, (1,), delta_rank=2))
    places = skeleton(Architecture(model, routing, 61, 0, born)).places()
    expected = {
        "embedding.weight": Place(Part.embedding),
        "embedding.deltas.1.up": Place(Part.embedding, None, 1),
        "blocks.0.attention_norm.weight": Place(Part.norm, 0),
        "blocks.0.attention.query.weight": Place(Part.attention, 0),
        "blocks.0.attention.query.deltas.1.down": Place(Part.attention, 0, 1),
        "blocks.0.moe.shared.gate_up": Place(Part.dense, 0),
        "blocks.1.moe.shared.gate_up": Place(Part.shared, 1),
        "blocks.1.moe.mix.bias": Place(Part.shared, 1),
        "blocks.1.moe.router.rows.0": Place(Part.router, 1, 0),
        "blocks.1.moe.router.rows.1": Place(Part.router, 1, 1),
        "blocks.1.moe.banks.generations.0.down": Place(Part.expert, 1, 0),
        "blocks.1.moe.banks.generations.1.gate_up": Place(Part.expert, 1, 1),
        "norm.weight": Place(Part.norm),
        "head.weight": Place(Part.head),
    }
    assert {name: places[name] for name in expected} == expected
    assert not any(places[name].is_trunk for name in expected if places[name].generation is not None)
    assert places["blocks.0.moe.shared.gate_up"].is_trunk and places["blocks.1.moe.mix.bias"].is_trunk


def test_a_tied_table_is_the_embedding(make_architecture: MakeArchitecture) -> None:
    places = skeleton(make_architecture(model={"tie_embeddings": True})).places()
    assert places["embedding.weight"].part == Part.embedding and "head.weight" not in places


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("blocks.12.moe.banks.experts.30.gate_up", (12, 30, None)),
        ("blocks.1.moe.shared.down", (1, None, None)),
        ("blocks.1.moe.router.noise_rows.10", (1, None, 10)),
        ("blocks.1.moe.router.bias_2", (1, None, 2)),
        ("blocks.1.moe.router.coefficient", (1, None, None)),
        ("blocks.3.attention.output.deltas.4.up", (3, None, 4)),
        ("head.deltas.4.down", (None, None, 4)),
        ("document_clusters.centroids_1", (None, None, 1)),
        ("document_clusters.projection", (None, None, None)),
    ],
)
def test_names_by_hand(name: str, parsed: tuple[int | None, int | None, int | None]) -> None:
    found = TensorName.parse(name)
    assert (found.layer, found.expert, found.generation) == parsed and str(found) == name


def test_names_are_made_as_they_are_read() -> None:
    assert expert_tensor(3, 11, "down") == "blocks.3.moe.banks.experts.11.down"
    assert router_rows(3, 1) == "blocks.3.moe.router.rows.1"
    moved = replace(TensorName.parse("blocks.3.moe.banks.experts.11.down"), layer=0, expert=2)
    assert str(moved) == "blocks.0.moe.banks.experts.2.down"


def test_names_once_a_generation_is_gone(make_architecture: MakeArchitecture) -> None:
    architecture = make_architecture("learned", (4, 2, 3))
    names = [
        "blocks.0.moe.banks.experts.3.down", "blocks.0.moe.banks.experts.4.down", "blocks.0.moe.banks.experts.6.down",
        "blocks.0.moe.router.rows.0", "blocks.0.moe.router.rows.1", "blocks.0.moe.router.rows.2", "head.weight",
    ]  # fmt: skip
    assert [renamed(architecture, name, 1) for name in names] == [
        "blocks.0.moe.banks.experts.3.down", None, "blocks.0.moe.banks.experts.4.down",
        "blocks.0.moe.router.rows.0", None, "blocks.0.moe.router.rows.1", "head.weight",
    ]  # fmt: skip
