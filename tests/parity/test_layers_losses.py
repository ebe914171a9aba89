"""Losses of routers once over all layers, as a device computes them: those of each layer by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lifelong_moe.config.model import ModelConfig
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Generation, first_generation
from lifelong_moe.routing import losses
from lifelong_moe.routing.base import LayersLoss
from lifelong_moe.training.loop.module import router_losses

SHAPE: dict[str, Any] = {"layers": 4, "experts": [2, 4, 4, 2]}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "all alike": ("learned", {}, 1),
    "two sizes of layers": ("learned", {"model": SHAPE}, 2),
    "the newest alone": ("learned", {"routing": {"balance_over": "active"}}, 1),
    "bundles": ("bundles", {}, 1),
    "vmoe": ("vmoe", {}, 1),
    "relu": ("relu", {}, 1),
}


def taken(model: LanguageModel, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Each loss's mean over layers, and the gradients of their weighted sum."""
    torch.manual_seed(0)  # of noise
    model.zero_grad()
    tokens = TokenBatch(batch["token_ids"], domain_ids_BS=batch["domain_ids"], mask_BS=batch["mask"])
    found = router_losses(model(tokens).routings)
    torch.stack([weighted for _, weighted in found.values()]).sum().backward()
    gradients = [one.grad for layer in model.moe_layers() for one in layer.router.parameters() if one.grad is not None]
    return {name: mean.detach() for name, (mean, _) in found.items()}, gradients


@pytest.mark.parametrize("case", CASES)
def test_all_layers_at_once_are_each_by_itself(
    make_model: Callable[..., LanguageModel],
    make_batch: Callable[..., dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    kind, sections, num_groups = CASES[case]
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    sections = sections | {"routing": {"balance_loss": 0.1, "z_loss": 0.2} | sections.get("routing", {})}
    born = (first_generation("s0", ModelConfig(**SHAPE)),) if "model" in sections else (4, Generation("s1", 4))
    model = make_model(kind, born, **sections).double().train()
    batch = make_batch(domains=len(born))
    batch["mask"][0, 9:] = False
    expected, apart = taken(model, batch)
    groups: list[int] = []
    of_all = LayersLoss.of_all

    def counted(layers: list[LayersLoss]) -> tuple[Tensor, Tensor]:
        groups.append(len({tuple(tensor.shape for tensor in one.own) for one in layers}))
        return of_all(layers)

    monkeypatch.setattr(LayersLoss, "of_all", staticmethod(counted))
    monkeypatch.setattr(losses, "_waits", lambda values: True)
    found, at_once = taken(model, batch)
    assert groups == [num_groups] * len(groups) and groups
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-13, atol=0)
    assert apart and len(apart) == len(at_once)
    for one, other in zip(apart, at_once, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-15)
