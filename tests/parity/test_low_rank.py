"""Low-rank experts: shared products against each expert's whole matrices, values and gradients; and what they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lifelong_moe.config.growth import FrozenWeights, GrowConfig
from lifelong_moe.config.model import Activation, ExpertsImplementation
from lifelong_moe.errors import ConfigError, CorruptError
from lifelong_moe.growth.grow import grow
from lifelong_moe.growth.remove import remove_generation
from lifelong_moe.model.experts import ExpertBanks, LowRankExperts
from lifelong_moe.model.int8 import hold_frozen, make_whole
from lifelong_moe.model.offload import offloaded
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Generation
from lifelong_moe.training.restore import build_model
from tests.conftest import build_batch
from tests.integration.test_offload import Clones

Make = Callable[..., LanguageModel]
BORN = ((3, 0), (4, 2), (1, 0), (0, 2), (2, 3))
"""Number and rank of each generation's experts."""
COUNTS = {
    "all": [2, 1, 3, 2, 0, 4, 1, 2, 3, 1],
    "low-rank ones alone": [0, 0, 0, 1, 5, 2, 1, 0, 0, 0],
    "whole ones alone": [3, 1, 2, 0, 0, 0, 0, 4, 0, 0],
    "no rows": [0] * 10,
}


def banks_of(activation: Activation, trained: tuple[int, ...]) -> ExpertBanks:
    banks, generator = ExpertBanks(6, 5, activation), torch.Generator().manual_seed(0)
    for num, rank in BORN:
        banks.add(num, rank)
    for parameter in banks.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    for g, bases in ((1, [0, 0, 2, 0]), (4, [7, 1])):
        banks.born[g].base.copy_(torch.tensor(bases))
    for g, generation in enumerate(banks.born):
        generation.requires_grad_(g in trained)
    assert banks.has_sound_bases() and [banks.base_of(i) for i in (1, 5, 7, 9)] == [1, 2, 7, 1]
    return banks


@pytest.mark.parametrize("trained", [(4,), (1, 4), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("activation", [Activation.swiglu, Activation.relu])
def test_fast_equals_readable(activation: Activation, counts: list[int], trained: tuple[int, ...]) -> None:
    banks = banks_of(activation, trained)
    x = torch.randn(sum(counts), 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    upstream, found = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)), []
    wanted = [x, *(p for p in banks.parameters() if p.requires_grad and p.numel())]
    for banks.implementation in (ExpertsImplementation.slices, ExpertsImplementation.readable):
        out = banks(x, torch.tensor(counts))
        gradients = torch.autograd.grad((out * upstream).sum(), wanted, allow_unused=True)
        # What others change alone has no gradient where they have no rows.
        found.append([out, *(torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients, strict=True))])
    for fast, readable in zip(*found, strict=True):
        torch.testing.assert_close(fast, readable, atol=1e-5, rtol=1e-5)


def test_an_expert_without_rows_has_a_gradient_of_zero() -> None:
    banks = banks_of(Activation.swiglu, (4,))
    banks(torch.randn(4, 6), torch.tensor([4] + [0] * 9)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in banks.born[4].parameters())


@pytest.mark.parametrize("implementation", list(ExpertsImplementation))
def test_in_sixteen_bits(implementation: ExpertsImplementation) -> None:
    banks, x, counts = banks_of(Activation.swiglu, (4,)), torch.randn(19, 6), torch.tensor(COUNTS["all"])
    expected = banks(x, counts)
    banks.implementation = implementation
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = banks(x, counts)
    torch.testing.assert_close(out.float(), expected, atol=0.3, rtol=0.05)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_a_row_is_as_exact_whoever_else_has_rows(counts: list[int]) -> None:
    """Sums of experts' outputs are made in their type: it must not depend on the generations of a batch."""
    banks, x = banks_of(Activation.swiglu, (4,)), torch.randn(sum(counts), 6)
    banks.implementation = ExpertsImplementation.slices
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert not sum(counts) or banks(x, torch.tensor(counts)).dtype == torch.bfloat16


def logits(model: LanguageModel, domain: int = 0, seed: int = 3) -> Tensor:
    ids = torch.randint(1, 61, (2, 12), generator=torch.Generator().manual_seed(seed))
    domains = torch.full_like(ids, domain)
    return model.head.logits(model.eval()(TokenBatch(ids, domain_ids_BS=domains)).hidden_BSD, domains)


def grown(make_model: Make, kind: str = "labelled_bundles", ranks: tuple[int, ...] = (2,), **routing: Any) -> Any:
    model = make_model(kind, (1,), routing=routing)
    for g, rank in enumerate(ranks, 1):
        config = GrowConfig(experts=3, rank=rank, init="copy")
        grow(model, Generation(f"s{g}", 3, rank=rank), config, build_batch(domains=g), seed=g)
    return model


def stirred(model: LanguageModel) -> LanguageModel:
    """The same model after its newest generation has trained."""
    generator = torch.Generator().manual_seed(9)
    for parameter in model.parameters_of(generation=len(model.architecture.generations) - 1).values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", ["labelled_bundles", "learned"])
def test_a_stage_begins_where_the_model_was(make_model: Make, kind: str) -> None:
    model = make_model(kind, (1,))
    before = logits(model)
    grow(model, Generation("s1", 3, rank=2), GrowConfig(experts=3, rank=2), build_batch(), seed=1)
    # Equal experts, whose gates sum to 1 but for rounding.
    torch.testing.assert_close(logits(model, 1), before, atol=1e-5, rtol=1e-5)
    assert kind == "learned" or torch.equal(logits(model), before)
    names = {name for name in model.state_dict() if ".experts.2." in name and name.startswith("blocks.1.")}
    tensors = ("base", "down_a", "down_b", "gate_up_a", "gate_up_b")
    assert sorted(names) == [f"blocks.1.moe.banks.experts.2.{name}" for name in tensors]
    assert not any(name.endswith(".base") for on in (True, False) for name in model.stored_names(trained=on))


@torch.no_grad()
def test_the_next_generation_begins_as_the_one_before(make_model: Make) -> None:
    model = stirred(grown(make_model))
    old = [logits(model, domain) for domain in (0, 1)]
    assert not torch.equal(*old)
    for rank, begins_as in ((2, 1), (3, 0), (0, 1)):
        again = build_model(model.architecture, model.state_dict())
        config = GrowConfig(experts=3, rank=rank, noise=0.0)
        grow(again, Generation("s2", 3, rank=rank), config, build_batch(domains=2), seed=1)
        assert all(torch.equal(logits(again, domain), old[domain]) for domain in (0, 1))
        # The most used experts are copied, which need not be those that each token used.
        if rank == 3:
            torch.testing.assert_close(logits(again, 2), old[begins_as], atol=1e-5, rtol=1e-5)
        bases = {b for layer in again.moe_layers() for g in layer.banks.born for b in getattr(g, "base", [])}
        assert {int(b) for b in bases} == {0}


def test_what_a_low_rank_expert_changes_is_checked(make_model: Make) -> None:
    model = grown(make_model)
    name = "blocks.0.moe.banks.experts.2.base"
    for odd in (1, 2, 7, -1):
        with pytest.raises(CorruptError, match="changes none of the older experts"):
            build_model(model.architecture, model.state_dict() | {name: torch.tensor(odd)})


@torch.no_grad()
def test_generations_go_unless_others_change_them(make_model: Make) -> None:
    model = stirred(grown(make_model, ranks=(0, 2, 2)))
    assert {int(b) for g in next(model.moe_layers()).banks.born[2:] for b in g.base} <= {1, 2, 3}
    with pytest.raises(ConfigError, match="stage s1's experts are what low-rank experts of a later stage change"):
        remove_generation(model.architecture, model.state_dict(), 1)
    left = build_model(*remove_generation(model.architecture, model.state_dict(), 2))
    assert torch.equal(logits(left, 2), logits(model, 3)) and torch.equal(logits(left, 1), logits(model, 1))
    with pytest.raises(ConfigError, match="stage s1's experts do not train on: the low-rank experts of stage s2"):
        model.architecture.continuing("s1")
    assert model.architecture.continuing("s2").continued == 2
    # Numbers move with those before them.
    model = stirred(grown(make_model, kind="learned", ranks=(0, 0, 2)))
    for layer in model.moe_layers():
        layer.banks.born[3].base.fill_(5)
    after = build_model(*remove_generation(model.architecture, model.state_dict(), 1))
    assert [g.base.tolist() for g in next(after.moe_layers()).banks.born if isinstance(g, LowRankExperts)] == [[2] * 3]


def test_in_eight_bits(make_model: Make) -> None:
    model = stirred(grown(make_model))
    whole, stored = logits(model, 1), {n: t.clone() for n, t in model.state_dict().items()}
    hold_frozen(model, FrozenWeights.int8)
    found = logits(model, 1)
    assert 0 < float((found - whole).detach().abs().mean()) < 0.05 * float(whole.detach().abs().mean())
    found.sum().backward()
    assert all(p.grad is not None for p in model.parameters_of(generation=1).values() if p.dim() == 3)
    make_whole(model, stored)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_offloaded(make_model: Make) -> None:
    model, found = stirred(grown(make_model)), []
    trained = [p for p in model.parameters() if p.requires_grad]
    for streamer in (None, Clones()):
        with offloaded([model], trained, streamer):
            out = logits(model, 1)
            found.append([out, *torch.autograd.grad(out.sum(), trained, allow_unused=True)])
    assert all(a is b or torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_stored_architecture_says_so_only_of_low_rank_experts(make_model: Make) -> None:
    stored: Any = grown(make_model).architecture.to_json()
    assert "rank" not in stored["generations"][0] and stored["generations"][1]["rank"] == 2
    architecture = grown(make_model).architecture
    assert type(architecture).from_json(stored) == architecture
    first = replace(architecture.generations[0], rank=1)
    with pytest.raises(ValueError, match="the first experts are changes of none"):
        type(architecture).from_json(replace(architecture, generations=(first,)).to_json())
