"""Tokens sorted by bundle against one token at a time: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_moe.model import deltas, head
from lifelong_moe.model.deltas import DeltaEmbedding, DeltaLinear, GenerationSlices, apply_readable
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Generation

BORN = (4, Generation("s1", 2, delta_rank=3), Generation("s2", 2, delta_rank=1))
MIXES = {
    "mixed": [0, 2, 1, 1, 0, 2, 1, 0],
    "an empty bundle": [2, 0, 0, 2, 2, 0, 0, 2],
    "one bundle": [1] * 8,
    "unknown": [7, 1, 3, 0, 1, 7, 2, 2],
}


class Readable:
    """In the place of :class:`GenerationSlices`."""

    present = None
    """Routers compute the logits of all generations."""

    def __init__(self, domain_ids_T: Tensor, num_generations: int) -> None:
        self.domain_ids_T, self.num_generations = domain_ids_T, num_generations

    def apply(self, x_TI: Tensor, function: Callable[[int, Tensor], Tensor]) -> Tensor:
        return apply_readable(x_TI, self.domain_ids_T, self.num_generations, function)


@pytest.fixture(params=MIXES)
def bundles(request: pytest.FixtureRequest) -> Tensor:
    """Bundles of eight tokens."""
    return torch.tensor(MIXES[request.param])


def filled(module: Any) -> Any:
    """Two changes, of rank 3 and 1; bundle 0 has none."""
    for rank in (0, 3, 1):
        module.add_generation(rank)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=generator)
    return module


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((output * weight).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]


def check(module: nn.Module, x: Tensor, domains_T: Tensor) -> None:
    inputs = [*module.parameters(), *([x] if x.requires_grad else [])]
    fast, readable = (module(x, slices) for slices in (GenerationSlices.of(domains_T, 3), Readable(domains_T, 3)))
    torch.testing.assert_close(fast, readable, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients(fast, inputs), gradients(readable, inputs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_linear(bundles: Tensor) -> None:
    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2), requires_grad=True)
    check(filled(DeltaLinear(5, 6)), x, bundles)


def test_embedding(bundles: Tensor) -> None:
    check(filled(DeltaEmbedding(9, 5)), torch.tensor([[0, 8, 3, 3], [1, 0, 8, 2]]), bundles)


@pytest.mark.parametrize("tied", [False, True])
def test_the_whole_model(
    make_model: Callable[..., LanguageModel], bundles: Tensor, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """Embedding, attention and head together, through training's loss."""
    model = make_model("labelled_bundles", BORN, model={"tie_embeddings": tied}).requires_grad_(True)
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(3))
    domains_BS, target_T = bundles.view(2, 4).repeat_interleave(2, dim=1), ids[:, 1:].flatten()

    def hidden() -> Tensor:
        return model(TokenBatch(ids[:, :-1], domain_ids_BS=domains_BS)).hidden_BSD

    fast = model.head.cross_entropy(hidden().flatten(0, 1), target_T, domains_BS.flatten())
    fast_logits = model.head.logits(hidden(), domains_BS)
    for module in (deltas, head):
        monkeypatch.setattr(module, "generation_slices", lambda *given: Readable(given[2].flatten(), 3))
    readable_logits = model.head.logits(hidden(), domains_BS)
    readable = F.cross_entropy(readable_logits.flatten(0, 1), target_T)
    torch.testing.assert_close(fast_logits, readable_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fast, readable, atol=1e-5, rtol=1e-5)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.numel()), strict=True)
    found, expected = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (fast, readable))
    touched = set()
    for name, one, other in zip(names, found, expected, strict=True):
        if one is None or other is None:
            assert not any(grad is not None and grad.any() for grad in (one, other)), name
            continue
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4, msg=name)
        if one.any():
            touched.add(name)
    used = {g for g in bundles.tolist() if g < 3}
    for bundle in (1, 2):
        assert any(f".deltas.{bundle}." in name for name in touched) is (bundle in used)


def test_each_use_of_a_tied_matrix_has_changes_of_its_own(make_model: Callable[..., LanguageModel]) -> None:
    model = make_model("labelled_bundles", BORN, model={"tie_embeddings": True})
    ids, hidden = torch.arange(8).unsqueeze(0), torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(4))
    domains = [torch.full((1, 8), bundle) for bundle in range(3)]

    def both() -> tuple[list[Tensor], list[Tensor]]:
        slices = [model.embedding.slices(one) for one in domains]
        return [model.embedding(ids, one) for one in slices], [model.head.logits(hidden, one) for one in domains]

    with torch.no_grad():
        vectors, logits = both()
        for name, parameter in model.head.deltas.named_parameters():
            parameter.add_(1.0 if name.startswith("1.") else 0.0)
        same, changed = both()
        assert all(map(torch.equal, vectors, same))
        assert [torch.equal(*pair) for pair in zip(logits, changed, strict=True)] == [True, False, True]
        for name, parameter in model.embedding.deltas.named_parameters():
            parameter.add_(1.0 if name.startswith("2.") else 0.0)
        moved, kept = both()
        assert all(map(torch.equal, changed, kept))
        assert [torch.equal(*pair) for pair in zip(vectors, moved, strict=True)] == [True, True, False]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("texts", ["all", "newest", "first", "unknown"])
@pytest.mark.parametrize("generations", [2, 3, 6])
def test_side_by_side_generations_compute_the_same(
    make_model: Callable[..., LanguageModel], generations: int, texts: str, tied: bool
) -> None:
    """Training's loss, logits and all gradients in float64, within its rounding."""
    born = (4, *(Generation(f"s{g}", 2, delta_rank=1 + g % 2) for g in range(1, generations)))
    ids = torch.randint(1, 61, (2, 17), generator=torch.Generator().manual_seed(3))
    domains_BS = torch.randint(0, generations, (2, 16), generator=torch.Generator().manual_seed(4))
    domains_BS = {
        "all": domains_BS,
        "newest": torch.full_like(domains_BS, generations - 1),
        "first": torch.zeros_like(domains_BS),
        "unknown": domains_BS + 1,
    }[texts]
    found = []
    for joins in (False, True):
        model = make_model("labelled_bundles", born, model={"width": 32, "tie_embeddings": tied}).double()
        generator = torch.Generator().manual_seed(5)
        for matrix in model.delta_matrices():
            for parameter in matrix.deltas.parameters():
                nn.init.normal_(parameter, std=0.1, generator=generator)
        for name, place in model.places().items():  # as a stage of the default method: the newest generation trains
            model.get_parameter(name).requires_grad_(place.generation == generations - 1)
        if joins:
            deltas.join_changes(model.delta_matrices())
            assert all(1 <= len(matrix.deltas.joined) <= 2 for matrix in model.delta_matrices())
        hidden_TD = model(TokenBatch(ids[:, :-1], domain_ids_BS=domains_BS)).hidden_BSD.flatten(0, 1)
        loss = model.head.cross_entropy(hidden_TD, ids[:, 1:].flatten(), domains_BS.flatten())
        loss = loss + model.head.logits(hidden_TD, domains_BS.flatten()).square().mean()
        loss.backward()
        # Without tokens some get zeros one way, and nothing the other.
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        found.append((loss.detach(), grads))
        deltas.part_changes(model.delta_matrices())
        assert not any(matrix.deltas.joined for matrix in model.delta_matrices())
    (ours, grads), (theirs, others) = found
    assert abs(float(ours - theirs)) <= 3e-15 * float(theirs) and grads.keys() == others.keys()
    assert texts == "first" or any("deltas" in name for name in grads)
    norm = float(torch.nn.utils.get_total_norm(grads.values()))
    for name, one in grads.items():
        assert float((one - others[name]).norm()) <= 3e-15 * norm, name


def test_changes_that_are_together_wider_than_the_matrix_are_not_laid_side_by_side() -> None:
    linear = DeltaLinear(16, 16)
    for rank in (0, 4, 4, 1):
        linear.add_generation(rank)
        deltas.join_changes([linear])
        # Two products of 8 columns and 32 rows and columns cost as much as one of 16 by 16.
        assert bool(linear.deltas.joined) == (0 < sum(len(one.down) for one in linear.deltas.values()) <= 8)


def test_what_a_generation_computes_does_not_change_by_a_bit_when_others_are_added() -> None:
    """Without side by side: on a CPU, and wherever nothing trains."""
    x, generator = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    domains_T = torch.randint(0, 3, (64,), generator=generator)
    linear, found = DeltaLinear(48, 40), []
    nn.init.normal_(linear.weight, generator=generator)
    for rank in (0, 5, 3, 7, 1, 6):
        linear.add_generation(rank)
        for parameter in list(linear.deltas.parameters())[-2:] if rank else ():
            nn.init.normal_(parameter, generator=generator)
        num = linear.deltas.num_generations
        if num >= 3:
            found.append(linear(x, GenerationSlices.of(domains_T, num)))
    assert len(found) == 4 and all(torch.equal(one, found[0]) for one in found)
