"""Experts under ``fully_shard``: each step is seen by the next, however a layer computes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from lifelong_moe.config.model import ExpertsImplementation
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.training.ranks.sharding import shard_model
from tests.forked import run_forked

pytestmark = pytest.mark.usefixtures("forked")

STEPS, RANKS = 4, 2
Make = Callable[..., LanguageModel]


def losses(model: LanguageModel, batch: dict[str, Tensor]) -> list[float]:
    """Of some steps on the same text."""
    optimizer, found = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    tokens = TokenBatch(batch["token_ids"], batch["document_ids"], batch["domain_ids"], batch["mask"])
    for _ in range(STEPS):
        hidden_TD = model(tokens).hidden_BSD.flatten(0, 1)
        loss = model.head.cross_entropy(hidden_TD, batch["target_ids"].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("how", [ExpertsImplementation.slices, ExpertsImplementation.grouped_mm])
def test_losses_are_those_of_one_process(
    make_model: Make, make_batch: Callable[..., dict[str, Tensor]], tmp_path: Path, how: ExpertsImplementation
) -> None:
    shape = {"width": 32, "expert_width": 32, "init_std": 0.1}

    def made() -> LanguageModel:
        model = make_model("learned", (4, 4), model=shape).eval()
        model.freeze_generations(1)
        for layer in model.moe_layers():
            layer.banks.implementation = how
        return model

    def work(rank: int) -> list[float]:
        model, mesh = made(), init_device_mesh("cpu", (dist.get_world_size(),))
        shard_model(model, mesh)
        for layer in model.moe_layers():
            layer.banks.join()  # as a stage does, which must leave sharded parameters alone
        # Each rank on the same text: the mean of their gradients is the gradient of one.
        return losses(model, make_batch())

    sharded = run_forked(RANKS, work, tmp_path)
    assert sharded == pytest.approx(losses(made(), make_batch()), abs=1e-5)
