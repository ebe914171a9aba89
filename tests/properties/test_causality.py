"""What comes later, or stands beside it in the batch, changes neither a token's experts nor its logits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.routing.cluster import TokenClusterRouter

LENGTH = 16
Make = Callable[..., LanguageModel]
KINDS = ["learned", "token_embedding", "token_hidden", "document", "label", "hash", "bundles", "hashing"]


@pytest.fixture(scope="module")
def models(make_model: Make) -> dict[str, LanguageModel]:
    """A grown model of each kind."""
    built = {kind: make_model(kind, (4, 2)).eval() for kind in KINDS[:-1]}
    built["hashing"] = make_model("token_hidden", (4, 2)).eval()
    for layer in built["hashing"].moe_layers():
        assert isinstance(layer.router, TokenClusterRouter)
        layer.router.hashing = True
    return built


def look(model: LanguageModel, ids_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``(B, S, V)``, and experts and weights of all layers ``(B, S, L, K)``; groups as they are made."""
    groups = torch.ones_like(ids_BS)
    if model.document_clusters is not None:
        found = [model.document_clusters.group_ids(row) for row in ids_BS.numpy()]
        groups = torch.from_numpy(np.stack(found))
    with torch.no_grad():
        output = model(ids_BS, document_ids_BS=torch.zeros_like(ids_BS), group_ids_BS=groups)
        logits = model.logits(output.hidden_BSD)
    shape = (*ids_BS.shape, -1)
    experts = torch.stack([r.expert_ids_TK.view(shape) for r in output.routings], dim=2)
    weights = torch.stack([r.weights_TK.view(shape) for r in output.routings], dim=2)
    return logits, experts, weights


@pytest.mark.parametrize("kind", KINDS)
@given(cut=st.integers(1, LENGTH - 1), seed=st.integers(0, 10_000))
def test_the_future_changes_nothing(models: dict[str, LanguageModel], kind: str, cut: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 61, (2, LENGTH), generator=generator)
    other = ids.clone()
    other[:, cut:] = torch.randint(1, 61, (2, LENGTH - cut), generator=generator)
    (logits, experts, weights), changed = look(models[kind], ids), look(models[kind], other)
    assert torch.equal(experts[:, :cut], changed[1][:, :cut])
    torch.testing.assert_close(weights[:, :cut], changed[2][:, :cut], atol=1e-6, rtol=0)
    torch.testing.assert_close(logits[:, :cut], changed[0][:, :cut], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10_000))
def test_batch_mates_change_nothing(models: dict[str, LanguageModel], kind: str, seed: int) -> None:
    ids = torch.randint(1, 61, (3, LENGTH), generator=torch.Generator().manual_seed(seed))
    together, alone = look(models[kind], ids), look(models[kind], ids[1:2])
    assert torch.equal(together[1][1], alone[1][0])
    torch.testing.assert_close(together[0][1], alone[0][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_past_does_change_something(models: dict[str, LanguageModel], kind: str) -> None:
    """Otherwise the tests above would pass with a model that looks at nothing."""
    ids = torch.randint(1, 61, (20, LENGTH), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, :8] = torch.randint(1, 61, (20, 8), generator=torch.Generator().manual_seed(1))
    before, after = look(models[kind], ids), look(models[kind], other)
    assert float((before[0][:, 8:] - after[0][:, 8:]).abs().max()) > 0.1
    if kind in ("learned", "token_hidden", "document", "bundles"):
        assert not torch.equal(before[1][:, 8:], after[1][:, 8:])
