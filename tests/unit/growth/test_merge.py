"""Merging experts: which pair, and what becomes of weights and rows, by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lifelong_moe.errors import ConfigError
from lifelong_moe.growth.merge import cheapest_pair, merge_experts, output_similarity, weighted
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Generation

Make = Callable[..., LanguageModel]


def test_weights_are_averaged_by_usage() -> None:
    keep, gone = torch.tensor([0.0, 4.0]), torch.tensor([8.0, 0.0])
    assert weighted(keep, gone, 3, 1).tolist() == [2.0, 3.0]
    assert weighted(keep, gone, 0, 0).tolist() == [4.0, 2.0]
    assert weighted(keep, gone, 5, 0).tolist() == keep.tolist()


def test_the_pair_that_changes_least() -> None:
    similarity = torch.eye(3)
    similarity[0, 1] = similarity[1, 0] = 0.9
    similarity[0, 2] = similarity[2, 0] = 0.5
    # min(share) * (1 - similarity): (0, 1) 0.3 * 0.1; (0, 2) 0.1 * 0.5; (1, 2) 0.1 * 1
    assert cheapest_pair(similarity, torch.tensor([60, 30, 10]), [0, 1, 2], [0, 1, 2]) == (0, 1)
    # (0, 1) 0.1 * 0.1, (0, 2) 0.3 * 0.5, (1, 2) 0.1 * 1, and with (0, 1) left out the more alike (0, 2) against 0.1
    assert cheapest_pair(similarity, torch.tensor([60, 10, 30]), [0, 1, 2], [0, 1, 2]) == (0, 1)
    assert cheapest_pair(similarity, torch.tensor([60, 10, 30]), [0, 1], [2]) == (1, 2)
    # both shares count: (0, 2) 0.02 * 0.5 and (1, 2) 0.02 * 1, then (0, 1) 0.03 * 0.1 and (2, 1) 0.03 * 1
    assert cheapest_pair(similarity, torch.tensor([95, 3, 2]), [0, 1], [2]) == (0, 2)
    assert cheapest_pair(similarity, torch.tensor([95, 3, 2]), [2, 0], [1]) == (0, 1)
    # hardly used, the third goes first
    assert cheapest_pair(similarity, torch.tensor([60, 39, 1]), [0, 1], [2]) == (0, 2)
    with pytest.raises(ValueError, match="no two experts"):
        cheapest_pair(similarity, torch.tensor([1, 1, 1]), [1], [1])


@torch.no_grad()
def test_equal_experts_are_wholly_alike(make_model: Make) -> None:
    layer = next(iter(make_model().moe_layers()))
    first, second, *_ = layer.banks.matrices()
    for copied, matrix in zip(second, first, strict=True):
        copied.copy_(matrix)
    inputs = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    similarity = output_similarity(torch.stack([expert(inputs) for expert in layer.banks.networks()]))
    assert similarity.diagonal().tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    assert float(similarity[0, 1]) == pytest.approx(1.0, abs=1e-5) and float(similarity[0, 2]) < 0.9


def test_a_merged_model_has_one_expert_less_and_the_rest_as_it_was(make_model: Make) -> None:
    model = make_model("learned", (2, 3, 2))  # experts 0-1, 2-4, 5-6; the last two train
    counts = {layer: torch.tensor([4, 4, 6, 2, 4, 4, 4]) for layer in range(2)}
    before = model.state_dict()
    architecture, tensors = merge_experts(model.architecture, before, 1, {0: (2, 3), 1: (0, 4)}, counts)
    assert [generation.experts for generation in architecture.generations] == [2, 2, 2]
    merged = LanguageModel(architecture)
    merged.load_state_dict(tensors, strict=True)
    first, second = (f"blocks.{layer}.moe.banks.experts" for layer in (0, 1))
    assert torch.allclose(
        tensors[f"{first}.2.down"], 0.75 * before[f"{first}.2.down"] + 0.25 * before[f"{first}.3.down"]
    )
    assert torch.equal(tensors[f"{first}.3.down"], before[f"{first}.4.down"])  # one index lower
    assert torch.equal(tensors[f"{second}.3.gate_up"], before[f"{second}.3.gate_up"])  # the one after it went
    row = "blocks.0.moe.router.rows.1"
    assert torch.allclose(tensors[row][0], 0.75 * before[row][0] + 0.25 * before[row][1])
    assert torch.equal(tensors[row][1], before[row][2])
    assert torch.equal(before[row], model.state_dict()[row])  # the old ones are not touched


@pytest.mark.parametrize("kind", ["bundles", "hash", "label"])
def test_only_a_learned_router_without_bundles(make_model: Make, kind: str) -> None:
    model = make_model(kind, (4, 2))
    with pytest.raises(ConfigError, match="merged only under a learned"):
        merge_experts(model.architecture, model.state_dict(), 0, {0: (0, 1), 1: (0, 1)}, {})


def test_what_trains_is_not_merged(make_model: Make) -> None:
    model = make_model("learned", (2, 2))
    with pytest.raises(ValueError, match="must be frozen"):
        merge_experts(model.architecture, model.state_dict(), 1, {0: (2, 3), 1: (2, 3)}, {})


@pytest.mark.parametrize(
    ("generation", "pair"),
    [
        (1, (2, 2)),  # itself
        (1, (7, 3)),  # who stays trains
        (1, (-1, 3)),
        (1, (0, 1)),  # who goes is of another generation
        (1, (0, 5)),
        (2, (0, 4)),
    ],
)
def test_who_cannot_go_into_whom(make_model: Make, generation: int, pair: tuple[int, int]) -> None:
    model = make_model("learned", (2, 3, 2, 2))  # experts 0-1, 2-4, 5-6, and 7-8, which train
    with pytest.raises(ValueError, match=f"layer 1: cannot merge expert {pair[1]} of generation {generation} "):
        merge_experts(
            model.architecture, model.state_dict(), generation, {0: (2, 6 if generation == 2 else 3), 1: pair}, {}
        )


@pytest.mark.parametrize("pair", [(0, 2), (6, 4), (0, 4), (1, 3)])
def test_the_first_and_the_last_may(make_model: Make, pair: tuple[int, int]) -> None:
    model = make_model("learned", (2, 3, 2, 2))
    counts = {layer: torch.ones(9) for layer in range(2)}
    architecture, _ = merge_experts(model.architecture, model.state_dict(), 1, {0: pair, 1: pair}, counts)
    assert [generation.experts for generation in architecture.generations] == [2, 2, 2, 2]


def test_each_layer_that_has_the_generation_loses_one(make_model: Make) -> None:
    model = make_model("learned", (2, Generation("b", 2, layers=(1,)), 2))
    with pytest.raises(ValueError, match=r"has experts in layers \[1\]; got pairs for layers \[0, 1\]"):
        merge_experts(model.architecture, model.state_dict(), 1, {0: (0, 1), 1: (0, 2)}, {})
    merge_experts(model.architecture, model.state_dict(), 1, {1: (0, 2)}, {1: torch.ones(6)})


def test_a_pyramid_is_not_merged(make_model: Make) -> None:
    model = make_model("learned", (4, 2, 2))
    first = replace(model.architecture.generations[0], by_layer=(4, 4))
    uneven = replace(model.architecture, generations=(first, *model.architecture.generations[1:]))
    with pytest.raises(ConfigError, match=r"model\.experts differs by layer"):
        merge_experts(uneven, model.state_dict(), 1, {0: (0, 4), 1: (0, 4)}, {})


@pytest.mark.parametrize("routing", [{"score": "sigmoid", "bias_rate": 0.1}, {"expert_groups": 2, "top_groups": 2}])
def test_biases_and_groups_are_not_merged(make_model: Make, routing: dict[str, Any]) -> None:
    model = make_model("learned", (4,), routing=routing)
    with pytest.raises(ConfigError, match="biases and expert groups"):
        merge_experts(replace(model.architecture, frozen=1), model.state_dict(), 0, {0: (0, 1), 1: (0, 1)}, {})


def test_what_a_token_uses_is_left(make_model: Make) -> None:
    model, counts = make_model("learned", (2, 2)), {layer: torch.ones(4) for layer in range(2)}
    pairs = {0: (0, 1), 1: (0, 1)}
    with pytest.raises(ConfigError, match=r"at least routing\.top_k=2 experts"):
        merge_experts(model.architecture, model.state_dict(), 0, pairs, counts)
    single = make_model("learned", (2, 2), routing={"top_k": 1, "renormalize": False})
    assert merge_experts(single.architecture, single.state_dict(), 0, pairs, counts)[0].generations[0].experts == 1


def test_the_only_expert_of_a_generation_stays(make_model: Make) -> None:
    model = make_model("learned", (4, 1, 2))
    with pytest.raises(ValueError, match="must be frozen and have at least two experts"):
        merge_experts(model.architecture, model.state_dict(), 1, {0: (0, 4), 1: (0, 4)}, {})
