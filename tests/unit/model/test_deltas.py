"""Changes of the trunk that only one bundle's tokens see. Legend: T tokens, I input width, O output width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_moe.config.growth import GrowConfig, RouterInit
from lifelong_moe.growth.grow import grow
from lifelong_moe.growth.noop import behavior
from lifelong_moe.model.deltas import DeltaEmbedding, DeltaLinear, GenerationSlices
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Generation

Make = Callable[..., LanguageModel]
Batch = Callable[..., dict[str, Tensor]]
SECOND, THIRD = Generation("s1", 2, delta_rank=3), Generation("s2", 2, delta_rank=2)
# What is not in the model counts as bundle 0.
MIXES = {
    "mixed": [0, 2, 1, 1, 0, 2, 1, 0],
    "an empty bundle": [2, 0, 0, 2, 2, 0, 0, 2],
    "one bundle": [1] * 8,
    "unknown": [7, 1, 3, 0, 1, 7, 2, 2],
}


@pytest.fixture(params=MIXES)
def bundles(request: pytest.FixtureRequest) -> Tensor:
    """Bundles of eight tokens."""
    return torch.tensor(MIXES[request.param])


def test_slices_by_hand() -> None:
    slices = GenerationSlices.of(torch.tensor([1, 0, 5, 1]), 2)
    assert GenerationSlices.of(torch.tensor([1, 0, 5, 1]), 2, (1, 2, 0, 0, 0, 1)).counts == slices.counts == [2, 2]
    assert GenerationSlices.of(torch.tensor([0, 0]), 3, (2,)).counts == [2, 0, 0]
    assert slices.counts == [2, 2] and slices.order_T.tolist() == [1, 2, 0, 3]
    seen = {}

    def note(bundle: int, rows: Tensor) -> Tensor:
        seen[bundle] = rows.flatten().tolist()
        return rows + 100 * bundle

    assert slices.apply(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), note).flatten().tolist() == [101, 2, 3, 104]
    assert seen == {0: [2, 3], 1: [1, 4]}


def test_a_batch_of_one_bundle_is_not_sorted() -> None:
    slices = GenerationSlices.of(torch.tensor([1, 1, 1]), 3)
    x_TI = torch.rand(3, 2)
    assert slices.apply(x_TI, lambda bundle, rows: rows) is x_TI


def test_no_tokens() -> None:
    slices = GenerationSlices.of(torch.zeros(0, dtype=torch.int64), 2)
    assert slices.apply(torch.zeros(0, 3), lambda bundle, rows: rows[:, :2]).shape == (0, 2)


def test_a_linear_map_by_hand() -> None:
    linear = DeltaLinear(2, 2)
    for rank in (0, 1):
        linear.add_generation(rank)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        linear.deltas["1"].up.copy_(torch.tensor([[10.0], [0.0]]))
        linear.deltas["1"].down.copy_(torch.tensor([[0.0, 1.0]]))
    assert linear.weight_of(0).tolist() == linear.weight_of(2).tolist() == [[1, 2], [3, 4]]
    assert linear.weight_of(1).tolist() == [[1, 12], [3, 4]]
    x_BSI = torch.tensor([[[1.0, 1.0], [1.0, 1.0]]])
    slices = GenerationSlices.of(torch.tensor([0, 1]), 2)
    assert linear(x_BSI, slices).tolist() == [[[3, 7], [13, 7]]]
    assert linear(x_BSI).tolist() == [[[3, 7], [3, 7]]]


@pytest.mark.parametrize("num_rows", [1, 3, 4, 9])
def test_few_rows_are_multiplied_by_the_factors(num_rows: int) -> None:
    torch.manual_seed(0)
    linear, x_NI = DeltaLinear(6, 12), torch.randn(num_rows, 6)
    for rank in (0, 5):
        linear.add_generation(rank)
    delta = linear.deltas.of(1)
    assert delta is not None
    torch.nn.init.normal_(delta.up)
    torch.nn.init.normal_(delta.down)
    slices = GenerationSlices.of(torch.ones(num_rows, dtype=torch.int64), 2)
    with_gradients = linear(x_NI, slices)
    with torch.no_grad():
        assert torch.allclose(linear(x_NI, slices), with_gradients, atol=1e-5)
    # 6 * 12 = 72 multiply-adds a rank for the change itself, 6 + 12 = 18 a rank and row without it: 4 rows are as dear.
    assert delta.suits(num_rows) == (num_rows < 4)


def test_an_embedding_by_hand() -> None:
    embedding = DeltaEmbedding(3, 2)
    for rank in (0, 1):
        embedding.add_generation(rank)
    with torch.no_grad():
        embedding.weight.copy_(torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]))
        embedding.deltas["1"].up.copy_(torch.tensor([[0.0], [5.0], [7.0]]))
        embedding.deltas["1"].down.copy_(torch.tensor([[1.0, -1.0]]))
    slices = GenerationSlices.of(torch.tensor([1, 0, 1, 0]), 2)
    assert embedding(torch.tensor([[2, 2], [0, 1]]), slices).tolist() == [[[10, -4], [3, 3]], [[1, 1], [2, 2]]]


def logits(model: LanguageModel, batch: dict[str, Tensor], domains_BS: Tensor) -> Tensor:
    with torch.no_grad():
        return model.head.logits(model(TokenBatch(batch["token_ids"], domain_ids_BS=domains_BS)).hidden_BSD, domains_BS)


def test_a_new_bundle_begins_as_the_trunk_itself(make_model: Make, make_batch: Batch) -> None:
    model, batch = make_model("labelled_bundles").eval(), make_batch()
    first = torch.zeros_like(batch["token_ids"])
    before = logits(model, batch, first)
    grow(model, SECOND, GrowConfig(experts=2), batch, seed=0)
    assert torch.equal(logits(model, batch, first), before)
    for matrix in model.delta_matrices():
        assert not matrix.deltas["1"].up.any() and matrix.deltas["1"].down.any()
    for matrix in (m for m in model.delta_matrices() if isinstance(m, DeltaLinear)):
        assert torch.equal(matrix.weight_of(1), matrix.weight)


def test_what_growth_is_compared_with_shares_frozen_changes_of_the_head(make_model: Make, make_batch: Batch) -> None:
    """A copy of each would cost as many as there are generations; what trains is copied, since growth may change it."""
    model, batch = make_model("labelled_bundles", (4, SECOND)).eval(), make_batch(domains=2)
    assert behavior(model, batch).head.deltas["1"] is not model.head.deltas["1"]
    model.freeze_generations()
    head = behavior(model, batch).head
    assert head.deltas["1"] is model.head.deltas["1"] and head.weight is not model.head.weight


def test_a_bundle_goes_on_from_the_one_before_it(make_model: Make, make_batch: Batch) -> None:
    model, batch = make_model("labelled_bundles", (4, SECOND)).eval(), make_batch(domains=2)
    grow(model, replace(THIRD, delta_rank=3), GrowConfig(experts=2, noise=0.0, router=RouterInit.copy), batch, seed=0)
    second, third = torch.ones_like(batch["token_ids"]), torch.full_like(batch["token_ids"], 2)
    torch.testing.assert_close(logits(model, batch, third), logits(model, batch, second), atol=1e-6, rtol=0)
    for layer in model.moe_layers():
        _, old, new = layer.banks.born
        assert all(torch.equal(a[:2], b[:2]) for a, b in zip(new.parameters(), old.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["labelled_bundles", "label"])
def test_a_new_bundle_changes_no_old_one(make_model: Make, make_batch: Batch, kind: str) -> None:
    model, batch = make_model(kind, (4, SECOND)).eval(), make_batch(domains=2)
    before = logits(model, batch, batch["domain_ids"])
    grow(model, THIRD, GrowConfig(experts=2), batch, seed=0)
    with torch.no_grad():
        for matrix in model.delta_matrices():
            matrix.deltas["2"].up.add_(1.0)
            trained = {name: p.requires_grad for name, p in matrix.deltas.named_parameters()}
            assert trained == {"1.up": False, "1.down": False, "2.up": True, "2.down": True}
    assert torch.equal(logits(model, batch, batch["domain_ids"]), before)


def test_only_a_bundle_s_tokens_see_its_change(make_model: Make, make_batch: Batch) -> None:
    model, batch = make_model("labelled_bundles", (4, SECOND, THIRD)).eval(), make_batch(domains=3)

    def embedded() -> Tensor:
        return model.embedding(batch["token_ids"], GenerationSlices.of(batch["domain_ids"].flatten(), 3))

    def scores() -> Tensor:
        return model.head.logits(torch.ones(4, 16, 16), batch["domain_ids"])

    with torch.no_grad():
        before = embedded(), scores()
        for matrix in (model.embedding, model.head):
            matrix.deltas["1"].up.add_(1.0)
        after = embedded(), scores()
    touched = batch["domain_ids"] == 1
    for old, new in zip(before, after, strict=True):
        assert torch.equal((old != new).any(dim=-1), touched)


def test_losses_of_mixed_bundles(make_model: Make, bundles: Tensor) -> None:
    """Against one token at a time, with its own bundle's head; gradients too."""
    model = make_model("labelled_bundles", (4, SECOND, THIRD)).requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(8, 16, generator=generator, requires_grad=True)
    target_T = torch.randint(0, 61, (8,), generator=generator)
    own = [model.head.weight_of(g if g < 3 else 0) for g in bundles.tolist()]
    nats = torch.stack([F.cross_entropy(own[t] @ hidden_TD[t], target_T[t]) for t in range(8)])
    torch.testing.assert_close(model.head.token_nats(hidden_TD, target_T, bundles), nats.detach(), atol=1e-5, rtol=0)
    loss = model.head.cross_entropy(hidden_TD, target_T, bundles)
    torch.testing.assert_close(loss, nats.mean(), atol=1e-5, rtol=0)
    weights = [hidden_TD, *model.head.parameters()]
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    expected = torch.autograd.grad(nats.mean(), weights, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None or not one.any()
        else:
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_without_groups_or_deltas_there_is_one_head(make_model: Make) -> None:
    model, plain = make_model("labelled_bundles", (4, SECOND)), make_model("labelled_bundles", (4, 2))
    hidden_TD, target_T = torch.randn(5, 16), torch.arange(5)
    ones_T = torch.ones(5, dtype=torch.int64)
    for one, first_T in ((model, 0 * ones_T), (plain, None)):
        base = F.cross_entropy(hidden_TD @ one.head.weight.t(), target_T)
        torch.testing.assert_close(one.head.cross_entropy(hidden_TD, target_T, first_T), base)
        torch.testing.assert_close(one.head.logits(hidden_TD, first_T), F.linear(hidden_TD, one.head.weight))
    for ask in (model.head.logits, lambda one: model.head.token_nats(one, target_T)):
        with pytest.raises(ValueError, match="give the domain_ids that the model has read"):
            ask(hidden_TD)
    nats = plain.head.cross_entropy(hidden_TD, target_T)
    assert torch.equal(plain.head.cross_entropy(hidden_TD, target_T, ones_T), nats)
    assert not torch.allclose(model.head.logits(hidden_TD, ones_T), model.head.logits(hidden_TD, 0 * ones_T))
