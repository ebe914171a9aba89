"""How rows and experts begin where a system's authors say so, and that growth goes on from there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import kstest, truncnorm
from torch import Tensor

from lifelong_moe.config.growth import ExpertInit, GrowConfig, RouterInit
from lifelong_moe.config.model import Activation
from lifelong_moe.growth.grow import grow
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Generation

Make = Callable[..., LanguageModel]
Batch = Callable[..., dict[str, Tensor]]
WIDE: dict[str, Any] = {"width": 64, "expert_width": 96, "activation": Activation.relu, "init_std": 0.02}


def follows(weight: Tensor, deviation: float) -> bool:
    """Whether entries are of a normal of this deviation, cut at two of them (Kolmogorov and Smirnov)."""
    found = kstest(weight.flatten().numpy() / deviation, truncnorm(-2, 2).cdf)
    return bool(found.pvalue > 1e-3)


def matrices(model: LanguageModel, generation: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """A generation's rows, and its experts' matrices in and out, of all layers."""
    layers = list(model.moe_layers())
    rows = [layer.router.row_generations()[generation] for layer in layers]
    born = [layer.banks.born[generation] for layer in layers]
    ins, outs = ([matrix for one in born for matrix in getattr(one, name).detach()] for name in ("up", "down"))
    return [one.detach() for one in rows], ins, outs


def test_switch_begins_small_by_its_inputs(make_model: Make) -> None:
    model = make_model("switch", (8,), model=WIDE)
    rows, ups, downs = (torch.cat([w.flatten() for w in found]) for found in matrices(model, 0))
    for weights, inputs in ((rows, 64), (ups, 64), (downs, 96)):
        assert follows(weights, math.sqrt(0.1 / inputs))
        assert float(weights.abs().max()) <= 2 * math.sqrt(0.1 / inputs)
    assert float(model.embedding.weight.detach().std()) == pytest.approx(0.02, rel=0.1)  # the trunk as in every mode


def test_vmoes_rows_begin_with_logits_of_one(make_model: Make) -> None:
    """flax's LeCun normal: the deviation is that of the cut distribution."""
    model = make_model("vmoe", (8,), model=WIDE | {"width": 256, "heads": 4})
    rows = torch.cat([w.flatten() for w in matrices(model, 0)[0]])
    assert float(rows.std()) == pytest.approx(1 / 16, rel=0.03)
    assert follows(rows, 1 / 16 / 0.87962566)


def test_bases_rows_begin_orthogonal(make_model: Make) -> None:
    for rows in matrices(make_model("base", (8,), model=WIDE), 0)[0]:
        torch.testing.assert_close(rows @ rows.t(), 0.01 * torch.eye(8), atol=1e-7, rtol=0)


@pytest.mark.parametrize("kind", ["switch", "base", "vmoe"])
def test_a_beginning_is_its_seeds(make_model: Make, kind: str) -> None:
    first, again, other = (make_model(kind, (4,), seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first if ".router." in name)


@pytest.mark.parametrize("kind", ["switch", "base", "vmoe"])
@pytest.mark.parametrize("router", list(RouterInit))
def test_growth_goes_on_at_the_scale_of_old_rows(
    make_model: Make, make_batch: Batch, kind: str, router: RouterInit
) -> None:
    model = make_model(kind, (8,), model=WIDE | {"context": 16})
    grow(model, Generation("s1", 8), GrowConfig(init=ExpertInit.random, router=router), make_batch(8), seed=1)
    old, new = (torch.cat(matrices(model, generation)[0]) for generation in (0, 1))
    assert float(new.norm(dim=1).mean()) == pytest.approx(float(old.norm(dim=1).mean()), rel=0.2)
    ups = torch.cat([w.flatten() for w in matrices(model, 1)[1]])
    assert follows(ups, math.sqrt(0.1 / 64)) is (kind == "switch")
