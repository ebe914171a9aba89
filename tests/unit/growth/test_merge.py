"""Merging experts: which pair, and what becomes of weights and rows, by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lifelong_moe.errors import ConfigError
from lifelong_moe.growth.merge import closest_pair, expert_outputs, merge_experts, output_similarity, weighted
from lifelong_moe.model.transformer import LanguageModel

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
    assert closest_pair(similarity, torch.tensor([60, 30, 10]), [0, 1, 2], [0, 1, 2]) == (0, 1)
    # hardly used, the third goes first
    assert closest_pair(similarity, torch.tensor([60, 39, 1]), [0, 1], [2]) == (0, 2)
    with pytest.raises(ValueError, match="no two experts"):
        closest_pair(similarity, torch.tensor([1, 1, 1]), [1], [1])


def test_equal_experts_are_wholly_alike(make_model: Make) -> None:
    layer = next(iter(make_model().moe_layers()))
    layer.banks.experts[1].load_state_dict(layer.banks.experts[0].state_dict())
    similarity = output_similarity(
        expert_outputs(layer, torch.randn(20, 16, generator=torch.Generator().manual_seed(0)))
    )
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
    with pytest.raises(ConfigError, match="merge only under a learned router"):
        merge_experts(model.architecture, model.state_dict(), 0, {0: (0, 1), 1: (0, 1)}, {})


def test_what_trains_is_not_merged(make_model: Make) -> None:
    model = make_model("learned", (2, 2))
    with pytest.raises(ValueError, match="must be frozen"):
        merge_experts(model.architecture, model.state_dict(), 1, {0: (2, 3), 1: (2, 3)}, {})
