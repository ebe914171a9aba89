"""What comes later, or stands beside it in the batch, changes neither a token's experts nor its logits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.routing.routers.cluster import TokenClusterRouter

LENGTH = 16
Make = Callable[..., LanguageModel]
TOKEN_LOCAL = [
    "learned", "token_embedding", "token_hidden", "document", "label", "hash", "bundles", "sigmoid", "noisy",
    "hierarchical", "dense", "relu", "multi_hash", "base", "hashing",
]  # fmt: skip
ORDERED = ["switch", "gshard"]
LEAKING = ["expert_choice", "by_choice", "by_batch", "next_choice", "vmoe"]
LEAKING_IN_TRAINING = ["base", "at_random"]
KINDS = [*TOKEN_LOCAL, *ORDERED]


@pytest.fixture(scope="module")
def models(make_model: Make) -> dict[str, LanguageModel]:
    """A grown model of each kind; capacities are such that they bind."""
    kinds = {*KINDS, *LEAKING, *LEAKING_IN_TRAINING} - {"hashing"}
    built = {kind: make_model(kind, (4, 2)).eval() for kind in kinds}
    built["hashing"] = make_model("token_hidden", (4, 2)).eval()
    for layer in built["hashing"].moe_layers():
        assert isinstance(layer.router, TokenClusterRouter)
        layer.router.hashing = True
    return built


def look(model: LanguageModel, ids_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``(B, S, V)``, and experts and weights of all layers ``(B, S, L, K)``; domains as they are made."""
    domains = torch.ones_like(ids_BS)
    if model.document_clusters is not None:
        found = [model.document_clusters.domain_ids(row) for row in ids_BS.numpy()]
        domains = torch.from_numpy(np.stack(found))
    with torch.no_grad():
        output = model(TokenBatch(ids_BS, document_ids_BS=torch.zeros_like(ids_BS), domain_ids_BS=domains))
        logits = model.head.logits(output.hidden_BSD)
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


def leaks(model: LanguageModel, seed: int) -> bool:
    """Whether replacing what comes later changes experts, or whether they are used, of what comes before."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 61, (2, LENGTH), generator=generator)
    other = torch.cat([ids[:, :8], torch.randint(1, 61, (2, 8), generator=generator)], dim=1)
    torch.manual_seed(0)
    before = look(model, ids)[1]
    torch.manual_seed(0)
    return not torch.equal(before[:, :8], look(model, other)[1][:, :8])


@pytest.mark.parametrize("kind", LEAKING)
def test_what_is_said_to_leak_does(models: dict[str, LanguageModel], kind: str) -> None:
    """The same perturbation finds the leaks that there are, so that finding none means something."""
    assert sum(leaks(models[kind], seed) for seed in range(20)) >= 5


@pytest.mark.parametrize("kind", LEAKING_IN_TRAINING)
def test_what_leaks_in_training_only(models: dict[str, LanguageModel], kind: str) -> None:
    models[kind].train()
    assert sum(leaks(models[kind], seed) for seed in range(20)) >= 5
    models[kind].eval()


@pytest.mark.parametrize("kind", ORDERED)
def test_order_is_what_keeps_capacity_causal(models: dict[str, LanguageModel], kind: str) -> None:
    """Something is dropped, so that capacity did bind in the tests above."""
    ids = torch.randint(1, 61, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    assert bool((look(models[kind], ids)[1] == -1).any())


@pytest.mark.parametrize("kind", [*TOKEN_LOCAL, *ORDERED, *LEAKING])
def test_routers_say_what_they_are(models: dict[str, LanguageModel], kind: str) -> None:
    router = next(iter(models[kind].moe_layers())).router
    kinds = {"ordered": ORDERED, "leaks": ["expert_choice"], "leaks_when_full": [*LEAKING[1:], "base"]}
    expected = next((name for name, members in kinds.items() if kind in members), "token_local")
    assert router.causality.name == expected
